//! What the tests of discovery are made of.
//!
//! Owns the fixtures: [`Library`] is one that is compiled and loaded into this process, [`relink`] makes main executables.
//! [`assert_sites`] compares what was found in one with what its own table says. Invariant: nothing stays behind; [`Directory`] and
//! [`Removed`] see to it.

use std::{
    env,
    ffi::{CStr, CString, OsStr, c_void},
    fs, mem,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{self, Command},
    ptr,
    sync::atomic::{AtomicU32, Ordering},
};

use object::{Object, ObjectSection, ObjectSymbol};
use trapline_engine::{Addr, Mode};
use trapline_process::discover::{
    Discovered, FoundSite, LoadedObject, Needs, ObjectRole, SiteKind, SkipReason, Skipped, compiled_in_sites,
    loaded_objects,
};

/// The functions of `functions.c`, in the order of its table.
pub(crate) const NAMES: [&str; 3] = ["public_function", "static_function", "calling_function"];

/// Distributions differ in the default.
pub(crate) const NO_ENDBR: &str = "-fcf-protection=none";

/// A function as the loader sees it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) entry: Addr,
}

/// Checks that the sites are these functions, in order of address, `offset` bytes behind their entries, and that the bytes
/// they were found with are there.
pub(crate) fn assert_sites(found: &Discovered, functions: &[Function], offset: i64, (kind, needs): (SiteKind, Needs)) {
    let mut functions = functions.to_vec();
    functions.sort_by_key(|function| function.entry);
    let expected: Vec<_> =
        functions.into_iter().map(|f| (f.name, f.entry, f.entry.offset(offset), kind, needs)).collect();
    let facts = |site: &FoundSite| (site.name.clone(), site.function, site.address, site.kind, site.needs);
    let sites: Vec<_> = found.sites.iter().map(facts).collect();
    assert_eq!(sites, expected, "{found:?}");
    for site in &found.sites {
        assert!(site.found.len() >= 5, "{site:?}");
        for (index, byte) in (0..).zip(&site.found) {
            assert_eq!(loaded_byte(site.address.offset(index)), *byte, "{site:?}");
        }
    }
}

/// Checks that these functions, and nothing else, were skipped for `reason`, `offset` bytes behind their entries.
pub(crate) fn assert_skipped(found: &Discovered, functions: &[Function], offset: i64, reason: &SkipReason) {
    let mut functions = functions.to_vec();
    functions.sort_by_key(|function| function.entry);
    let expected: Vec<Skipped> = functions
        .into_iter()
        .map(|f| Skipped { address: f.entry.offset(offset), name: f.name, reason: reason.clone() })
        .collect();
    assert_eq!(found.skipped, expected);
}

/// A shared object that is loaded into this process, and the directory that it lies in.
pub(crate) struct Library {
    handle: *mut c_void,
    pub(crate) path: PathBuf,
    object: LoadedObject,
    _directory: Directory,
}

impl Library {
    /// Compiles and loads a fixture with GCC.
    pub(crate) fn gcc(source: &str, flags: &[&str]) -> Self {
        Self::compiled_by("gcc", source, flags)
    }

    pub(crate) fn compiled_by(compiler: &str, source: &str, flags: &[&str]) -> Self {
        let directory = Directory::new();
        let path = directory.path(&Path::new(source).with_extension("so").to_string_lossy());
        compile(compiler, &shared(flags, &fixture(source)), &path);
        Self::open(directory, path)
    }

    /// Compiles `functions.c` with profiling at the entry. GCC makes the nops of it only in code that is not
    /// position-independent; linked to a shared object it is relocated when it is loaded.
    pub(crate) fn fentry(flags: &[&str]) -> Self {
        let directory = Directory::new();
        let object = directory.path("functions.o");
        let fentry = ["-c", "-O2", "-fno-pic", "-pg", "-mfentry", "-mrecord-mcount"];
        compile("gcc", &[&fentry[..], flags, &[&fixture("functions.c")]].concat(), &object);
        let path = directory.path("functions.so");
        compile("gcc", &["-shared", "-Wl,-z,notext", text(&object)], &path);
        Self::open(directory, path)
    }

    pub(crate) fn open(directory: Directory, path: PathBuf) -> Self {
        let name = CString::new(path.as_os_str().as_bytes()).expect("no null byte");
        // SAFETY: the fixtures have no constructors.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            // SAFETY: has no conditions.
            let message = unsafe { libc::dlerror() };
            // SAFETY: a load has just failed in this thread, so there is a message; it stays until the thread's next failure.
            let message = unsafe { CStr::from_ptr(message) };
            panic!("{}: {}", path.display(), message.to_string_lossy());
        }
        let real = fs::canonicalize(&path).expect("it was loaded");
        let objects = loaded_objects().expect("own memory");
        let object = objects.into_iter().find(|object| object.path == real).expect("it is loaded");
        assert_eq!(object.role, ObjectRole::Library);
        Self { handle, path, object, _directory: directory }
    }

    pub(crate) fn object(&self) -> &LoadedObject {
        &self.object
    }

    pub(crate) fn discover(&self) -> Discovered {
        compiled_in_sites(&self.object).expect("own memory")
    }

    pub(crate) fn symbol(&self, name: &str) -> Addr {
        let name = CString::new(name).expect("no null byte");
        // SAFETY: the handle is open.
        let address = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        assert!(!address.is_null(), "{name:?}");
        Addr::new(address as u64)
    }

    /// The functions of `functions.c`, from the table in it.
    pub(crate) fn functions(&self) -> [Function; 3] {
        let table: *const [usize; 3] = pointer(self.symbol("function_addresses"));
        // SAFETY: the fixture has this table of three pointers, aligned, relocated before `dlopen` returned, and the
        // library is loaded as long as `self` is there.
        let entries = unsafe { *table };
        std::array::from_fn(|index| Function { name: NAMES[index].into(), entry: Addr::new(entries[index] as u64) })
    }

    /// Unloads the library, and leaves its file.
    pub(crate) fn close(&mut self) {
        let handle = mem::replace(&mut self.handle, ptr::null_mut());
        if !handle.is_null() {
            // SAFETY: the handle is open, for the last time, and nothing keeps pointers into the library.
            unsafe { libc::dlclose(handle) };
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        self.close();
    }
}

/// A byte of a library that is loaded at this moment.
fn loaded_byte(at: Addr) -> u8 {
    let byte: *const u8 = pointer(at);
    // SAFETY: the tests ask for bytes of code of libraries that they hold open.
    unsafe { byte.read() }
}

fn pointer<T>(at: Addr) -> *const T {
    usize::try_from(at.value()).expect("an address of this process") as *const T
}

/// A directory of its own for each test, removed with everything in it.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        // Relaxed: only the number itself has to be unique.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = env::temp_dir().join(format!("trapline-discover-{}-{number}", process::id()));
        fs::create_dir(&path).expect("temporary directory");
        Self(fs::canonicalize(path).expect("just made"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{} is left: {error}", self.0.display());
        }
    }
}

pub(crate) fn fixture(name: &str) -> String {
    format!("{}/tests/fixtures/discover/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The arguments that make a shared object of a source file.
pub(crate) fn shared<'a>(flags: &[&'a str], source: &'a str) -> Vec<&'a str> {
    [&["-shared", "-fPIC", "-O2"], flags, &[source]].concat()
}

/// Runs a compiler or linker for the width of this program.
pub(crate) fn compile(compiler: &str, args: &[&str], output: &Path) {
    let width = format!("-m{}", Mode::NATIVE.bitness());
    run(Command::new(compiler).arg(width).args(args).arg("-o").arg(output));
}

/// Runs a command to its end, which must be a good one, and returns what it printed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout.into_owned()
}

/// Links this test program again, with `functions.c` in it.
///
/// Cargo keeps what it builds under a name that it derives from the arguments. They are the same each time, and the
/// executable is removed: nothing piles up in the target directory, and nothing old is found there.
pub(crate) fn relink(cargo: &OsStr, pie: bool, dynamic: bool) -> Removed {
    let temporary = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let object = temporary.join(format!("discover-{}-{pie}-{dynamic}.o", Mode::NATIVE.bitness()));
    let object = Removed(object);
    let code = if pie { "-fPIE" } else { "-fno-pie" };
    let flags = ["-c", "-O2", "-fpatchable-function-entry=5", NO_ENDBR, code];
    compile("gcc", &[&flags[..], &[&fixture("functions.c")]].concat(), &object.0);

    let mut command = Command::new(cargo);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command.args(["rustc", "--offline", "--quiet", "--message-format=json", "--test=discover"]);
    command.arg("--target-dir").arg(temporary.parent().expect("in the target directory"));
    if Mode::NATIVE == Mode::Bits32 {
        command.arg("--target=i686-unknown-linux-gnu");
    }
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    command.arg("--").arg(if pie { "-Crelocation-model=pie" } else { "-Crelocation-model=static" });
    command.arg(if dynamic { "-Ctarget-feature=-crt-static" } else { "-Ctarget-feature=+crt-static" });
    command.arg(format!("-Clink-arg={}", text(&object.0))).arg("-Clink-arg=-Wl,-u,public_function");
    let messages = run(&mut command);
    let (_, rest) = messages.split_once(r#""executable":""#).expect("cargo names the executable");
    Removed(PathBuf::from(rest.split('"').next().expect("the rest of a string")))
}

/// A file that is removed in the end, if it is still there.
pub(crate) struct Removed(pub(crate) PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Whether there is a clang. Where there must be one, its absence is a failure.
pub(crate) fn clang_is_here() -> bool {
    let here = Command::new("clang").arg("--version").output().is_ok();
    assert!(here || env::var_os("CI").is_none(), "clang has to be installed in CI");
    if !here {
        eprintln!("skipped: clang is not installed");
    }
    here
}

/// A function's address in the file's terms and the offset of its code in the file, from the symbol table.
pub(crate) fn find_symbol(file: &[u8], name: &str) -> Option<(u64, u64)> {
    let file = object::File::parse(file).expect("ELF");
    let symbol = file.symbols().find(|symbol| symbol.name() == Ok(name))?;
    let section = file.section_by_index(symbol.section_index().expect("defined")).expect("exists");
    let (section_offset, _) = section.file_range().expect("code is in the file");
    Some((symbol.address(), symbol.address() - section.address() + section_offset))
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("the tests' own names")
}

pub(crate) fn sorted<T: Ord>(items: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut items: Vec<T> = items.into_iter().collect();
    items.sort();
    items
}
