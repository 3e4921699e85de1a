//! Programs of Debian's i386 packages, which a 64-bit system has no room for beside its own.
//!
//! Owns [`i386`]: the packages are fetched by apt with lists of its own, checked as apt checks what it installs, and unpacked into a folder of the build's, once. Nothing of the
//! system is changed. Their libraries come along, so that a command needs only to be told where those are.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The programs, and the libraries that they are linked with or load.
const PACKAGES: &[&str] = &[
    "bash",
    "bzip2",
    "gawk",
    "gzip",
    "perl-base",
    "python3.11-minimal",
    "sqlite3",
    "xz-utils", // programs
    "libbz2-1.0",
    "libc6",
    "libcrypt1",
    "libexpat1",
    "libffi8",
    "libgmp10",
    "liblzma5",
    "libmpfr6",
    "libncursesw6",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libreadline8",
    "libsigsegv2",
    "libsqlite3-0",
    "libssl3",
    "libtinfo6",
    "libuuid1",
    "zlib1g",
];

/// The file that says what is unpacked.
const LIST: &str = "packages";

/// Where the packages are unpacked.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

/// The programs for i386, below `folder`, which is kept for the next time.
///
/// # Panics
/// They cannot be fetched: this needs apt, and the network the first time.
pub fn i386(folder: &Path) -> Root {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    Root(ROOT.get_or_init(|| unpacked(folder)).clone())
}

impl Root {
    /// What a command needs in its environment: where its libraries are, and Python's modules.
    pub fn environment(&self) -> Vec<(String, String)> {
        let libraries = ["usr/lib/i386-linux-gnu", "lib/i386-linux-gnu"].map(|part| self.0.join(part));
        let libraries = libraries.map(|path| path.to_string_lossy().into_owned()).join(":");
        let python = self.0.join("usr").to_string_lossy().into_owned();
        vec![("LD_LIBRARY_PATH".to_owned(), libraries), ("PYTHONHOME".to_owned(), python)]
    }

    /// The path of a program by its name; `None` if there is none.
    pub fn program(&self, name: &str) -> Option<PathBuf> {
        let paths = ["usr/bin", "bin"].map(|folder| self.0.join(folder).join(name));
        paths.into_iter().find(|path| path.is_file())
    }

    /// The words that run a program of theirs.
    ///
    /// # Panics
    /// There is none of this name.
    pub fn command(&self, name: &str, arguments: &[&str]) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec!["/usr/bin/env".into()];
        words.extend(self.environment().into_iter().map(|(variable, value)| format!("{variable}={value}").into()));
        words.push(self.program(name).unwrap_or_else(|| panic!("no package has {name}")).into());
        words.extend(arguments.iter().map(Into::into));
        words
    }
}

fn unpacked(folder: &Path) -> PathBuf {
    let root = folder.join("i386");
    let list = PACKAGES.join(" ");
    if fs::read_to_string(root.join(LIST)).is_ok_and(|there| there == list) {
        return root;
    }
    // What was fetched when others were wanted.
    let _ = fs::remove_dir_all(&root);
    // Another process of the tests may be about the same: the first one to be done wins.
    let work = folder.join(format!("i386.{}", std::process::id()));
    let state = work.join("apt");
    let made = work.join("root");
    for part in ["lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(state.join(part)).expect("a folder of the build's own");
    }
    fs::create_dir_all(&made).expect("a folder of the build's own");
    let apt = |words: &[String]| {
        let options = [
            format!("Dir::State::lists={}", state.join("lists").display()),
            format!("Dir::Cache={}", state.join("cache").display()),
            "APT::Architectures::=amd64".to_owned(),
            "APT::Architectures::=i386".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
        ];
        let mut command = Command::new("apt-get");
        command.args(options.iter().flat_map(|option| ["-o", option])).args(words).current_dir(&work);
        command.output().expect("apt-get: the packages are Debian's")
    };
    // Lists that cannot be refreshed may be those of a source that is not needed; the download tells.
    let _ = apt(&["update".to_owned()]);
    let mut words = vec!["download".to_owned()];
    words.extend(PACKAGES.iter().map(|name| format!("{name}:i386")));
    let downloaded = apt(&words);
    assert!(downloaded.status.success(), "apt-get download: {}", String::from_utf8_lossy(&downloaded.stderr));
    let packages = fs::read_dir(&work).expect("a folder of the build's own").flatten().map(|entry| entry.path());
    for package in packages.filter(|path| path.extension().is_some_and(|extension| extension == "deb")) {
        let status = Command::new("dpkg-deb").arg("-x").arg(&package).arg(&made).status().expect("dpkg");
        assert!(status.success(), "dpkg-deb -x {}: {status}", package.display());
    }
    fs::write(made.join(LIST), list).expect("a folder of our own");
    // An error means that there is one already.
    let _ = fs::rename(&made, &root);
    fs::remove_dir_all(&work).expect("a folder of our own");
    root
}
