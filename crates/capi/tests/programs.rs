//! C and C++ programs that use the library, static and shared, as their authors would: by pkg-config, with GCC and Clang, at the width of the tests.
//!
//! `cargo test -p trapline-capi --test programs -- --ignored` asks `AddressSanitizer` and Valgrind about them, which takes half a minute.

#[path = "../link.rs"]
mod link;

use std::{
    collections::BTreeSet,
    env,
    ffi::OsStr,
    fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
    time::SystemTime,
};

use link::Layout;

const IS_NARROW: bool = cfg!(target_pointer_width = "32");
const EXAMPLES: [&str; 4] = ["count", "histogram", "replace", "arguments"];
/// How long a program may take, in seconds: far more than it does.
const LIMIT_S: &str = "300";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Library {
    Static,
    Shared,
}

/// A compiler, and which library it links.
type How = (&'static str, Library);

/// Each compiler and each library once.
const USUAL: [How; 2] = [("gcc", Library::Static), ("clang", Library::Shared)];
const ALL: [How; 4] =
    [("gcc", Library::Static), ("gcc", Library::Shared), ("clang", Library::Static), ("clang", Library::Shared)];

/// A folder below the target's, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("capi-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// An installed library, in a folder for what is made with it.
struct Installed {
    folder: Folder,
}

impl Installed {
    fn new(name: &str) -> Self {
        let folder = Folder::new(name);
        let prefix = folder.0.to_str().expect("a path of text");
        let layout = Layout { root: Path::new(""), prefix, libraries: "lib" };
        let header = source("include/trapline.h");
        link::install(archive(), &header, IS_NARROW, &layout).unwrap_or_else(|error| panic!("{error}"));
        Self { folder }
    }

    fn libraries(&self) -> PathBuf {
        self.folder.0.join("lib")
    }

    /// What pkg-config says, for a static library with what that needs.
    fn flags(&self, library: Library) -> Vec<String> {
        let mut command = Command::new("pkg-config");
        command.env("PKG_CONFIG_PATH", self.libraries().join("pkgconfig")).args(["--cflags", "--libs", "trapline"]);
        if library == Library::Static {
            command.arg("--static");
        }
        let said = succeed(&mut command);
        let mut flags: Vec<String> =
            String::from_utf8_lossy(&said.stdout).split_whitespace().map(str::to_owned).collect();
        if library == Library::Static {
            // Linkers prefer a shared one.
            let archive = self.libraries().join("libtrapline.a").display().to_string();
            for flag in flags.iter_mut().filter(|flag| *flag == "-ltrapline") {
                flag.clone_from(&archive);
            }
        }
        flags
    }

    /// Compiles a program of this crate's, and returns its path.
    fn compile(&self, (compiler, library): How, path: &str, more: &[&str]) -> PathBuf {
        let from = source(path);
        let stem = from.file_stem().and_then(OsStr::to_str).expect("a name");
        let program = self.folder.0.join(format!("{stem}-{compiler}-{library:?}"));
        let standard = if compiler == "g++" { "-std=c++17" } else { "-std=c11" };
        let mut command = Command::new(compiler);
        // Not the newest debugging information, which Valgrind may not know.
        command.args([standard, "-O2", "-gdwarf-4", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-pthread"]);
        command.args(["-fpatchable-function-entry=5", version()]).args(more);
        if compiler == "gcc" {
            command.arg("-fno-ipa-ra");
        }
        if IS_NARROW {
            command.arg("-m32");
        }
        succeed(command.arg("-o").arg(&program).arg(from).args(self.flags(library)));
        program
    }

    /// A command that runs a program, and is over after a while; what is in front runs it.
    fn run(&self, front: &[&str], program: &Path) -> Command {
        let mut command = Command::new("timeout");
        command.arg(LIMIT_S).args(front).arg(program).env("LD_LIBRARY_PATH", self.libraries());
        command
    }
}

/// The version as the header's programs are told of it.
fn version() -> &'static str {
    static FLAG: OnceLock<String> = OnceLock::new();
    FLAG.get_or_init(|| format!("-DTRAPLINE_TEST_VERSION=0x{:08x}", trapline_c::status::trapline_version()))
}

fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The archive that cargo has built beside this test: the newest, if there are some of other features.
fn archive() -> &'static Path {
    static ARCHIVE: OnceLock<PathBuf> = OnceLock::new();
    ARCHIVE.get_or_init(|| {
        let own = env::current_exe().expect("a program has a path");
        let folder = own.parent().expect("it is in a folder");
        let is_archive = |path: &PathBuf| {
            path.file_name().and_then(OsStr::to_str).is_some_and(|name| {
                name.starts_with("libtrapline_c")
                    && Path::new(name).extension().is_some_and(|extension| extension == "a")
            })
        };
        let made =
            |path: &PathBuf| fs::metadata(path).and_then(|data| data.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        let files = fs::read_dir(folder).expect("the folder").filter_map(|entry| entry.ok().map(|entry| entry.path()));
        files.filter(is_archive).max_by_key(made).expect("cargo builds the archive with the tests")
    })
}

fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("starting {command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, said(&output));
    output
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn example(name: &str) -> String {
    format!("examples/{name}.c")
}

/// One test, because installing the library takes longer than all of it.
#[test]
fn programs_find_what_the_header_says_in_either_library() {
    let library = Installed::new("programs");
    the_shared_library_exports_the_header_and_the_signal_functions(&library);
    each_mistake_has_its_status_and_a_message(&library);
    a_thread_that_blocks_all_signals_is_traced(&library);
    the_examples_do_what_they_say(&library);
}

fn the_examples_do_what_they_say(library: &Installed) {
    for how in USUAL {
        for name in EXAMPLES {
            succeed(&mut library.run(&[], &library.compile(how, &example(name), &[])));
        }
    }
}

fn each_mistake_has_its_status_and_a_message(library: &Installed) {
    for how in USUAL {
        succeed(&mut library.run(&[], &library.compile(how, "tests/fixtures/misuse.c", &[])));
    }
    let program = library.compile(("g++", Library::Shared), "tests/fixtures/header.cpp", &[]);
    succeed(&mut library.run(&[], &program));
}

fn a_thread_that_blocks_all_signals_is_traced(library: &Installed) {
    for how in USUAL {
        let program = library.compile(how, "tests/fixtures/blocked.c", &[]);
        succeed(&mut library.run(&[], &program));
        // The control: behind the C library's back it is killed.
        let killed = library.run(&[], &program).arg("behind").output().expect("it starts");
        // `timeout` ends as the program did.
        assert_eq!(killed.status.signal(), Some(SIGTRAP), "{}", said(&killed));
    }
}

/// The number of the signal at both widths.
const SIGTRAP: i32 = 5;

fn the_shared_library_exports_the_header_and_the_signal_functions(library: &Installed) {
    let shared = library.libraries().join("libtrapline.so");
    let listed = succeed(Command::new("nm").args(["-D", "--defined-only"]).arg(&shared));
    let listed = String::from_utf8_lossy(&listed.stdout);
    let exported: BTreeSet<&str> = listed.lines().filter_map(|line| line.split_whitespace().nth(2)).collect();
    let header = fs::read_to_string(source("include/trapline.h")).expect("the header");
    let declared = header.lines().filter(|line| !line.starts_with([' ', '#', '/']) && !line.starts_with("typedef"));
    let functions = declared.filter_map(|line| {
        let name = line.split('(').next()?.rsplit([' ', '*']).next()?;
        (line.contains('(') && name.starts_with("trapline_")).then_some(name)
    });
    let major_minor = env!("CARGO_PKG_VERSION").rsplit_once('.').expect("three numbers").0;
    let versioned: BTreeSet<String> = functions.map(|name| format!("{name}@@TRAPLINE_{major_minor}")).collect();
    assert!(versioned.len() > 20, "{versioned:?}");
    let without_version = ["pthread_sigmask", "sigaction", "signal", "sigprocmask"].map(str::to_owned);
    let node = format!("TRAPLINE_{major_minor}");
    let expected: BTreeSet<String> = versioned.into_iter().chain(without_version).chain([node]).collect();
    assert_eq!(exported, expected.iter().map(String::as_str).collect());
    let dynamic = succeed(Command::new("readelf").args(["-d", "-W"]).arg(&shared));
    let name = format!("[libtrapline.so.{major_minor}]");
    assert!(
        String::from_utf8_lossy(&dynamic.stdout).lines().any(|line| line.contains("SONAME") && line.ends_with(&name))
    );
}

#[test]
#[ignore = "takes a quarter of a minute"]
fn address_sanitizer_has_nothing_to_say() {
    let library = Installed::new("asan");
    for how in ALL {
        for name in EXAMPLES {
            let program =
                library.compile(how, &example(name), &["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]);
            let output = succeed(&mut library.run(&[], &program));
            assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{how:?} {name}");
        }
        let program = library.compile(how, "tests/fixtures/leak.c", &["-fsanitize=address"]);
        let output = library.run(&[], &program).output().expect("it starts");
        assert!(said(&output).contains("heap-buffer-overflow"), "the control: {how:?}: {}", said(&output));
    }
}

/// At 32 bit, Valgrind needs a C library with debug information: Debian's libc6:i386 and libc6-dbg:i386, not the one of gcc-multilib.
#[test]
#[ignore = "takes a quarter of a minute"]
fn valgrind_has_nothing_to_say() {
    let library = Installed::new("valgrind");
    let front = [
        "valgrind",
        "--quiet",
        "--leak-check=full",
        "--show-leak-kinds=definite,indirect,possible",
        "--error-exitcode=99",
    ];
    for how in USUAL {
        for name in EXAMPLES {
            let program = library.compile(how, &example(name), &[]);
            let output = succeed(&mut library.run(&front, &program));
            assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{how:?} {name}");
        }
        let program = library.compile(how, "tests/fixtures/leak.c", &[]);
        let output = library.run(&front, &program).output().expect("it starts");
        assert_eq!(output.status.code(), Some(99), "the control: {how:?}: {}", said(&output));
        assert!(said(&output).contains("Invalid write"), "{}", said(&output));
        assert!(said(&output).contains("definitely lost"), "{}", said(&output));
    }
}
