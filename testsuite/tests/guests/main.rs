//! What a recording opens to others: nothing. No other user gets at the memory that recorder and target share, no file is left where others could
//! read it, and no page of a target is ever writable and executable (I8).

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Instant,
};

use trapline_testsuite::{
    program::{Library, Optimised, Program},
    run::{Command, End, PATIENCE, Running, wait_for},
    scratch::Scratch,
    trapline,
};

/// All processes below this one.
fn descendants(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let children: Vec<u32> = lists
        .flat_map(|list| list.split_whitespace().filter_map(|child| child.parse().ok()).collect::<Vec<_>>())
        .collect();
    children.iter().copied().chain(children.iter().flat_map(|&child| descendants(child))).collect()
}

/// Tries to open these files as another user. Returns those that let themselves be opened.
fn open_as_nobody(paths: &[PathBuf]) -> Vec<String> {
    let script =
        r#"for path; do (: <"$path") 2>/dev/null && echo "$path"; (: >>"$path") 2>/dev/null && echo "$path"; done; :"#;
    let mut words: Vec<std::ffi::OsString> =
        ["/usr/bin/setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/bin/sh", "-c", script, "sh"]
            .map(Into::into)
            .to_vec();
    words.extend(paths.iter().map(Into::into));
    let outcome = Command::new(words, Path::new("/")).run();
    assert_eq!(outcome.end, End::Status(0), "{}", outcome.error_text());
    outcome.text().lines().map(str::to_owned).collect()
}

/// Descriptors and mapped files of a process.
fn files_of(pid: u32) -> Vec<PathBuf> {
    let folders =
        ["fd", "map_files"].map(|name| fs::read_dir(format!("/proc/{pid}/{name}")).expect("a process that lives"));
    let mut files: Vec<PathBuf> = folders.into_iter().flatten().flatten().map(|file| file.path()).collect();
    files.push(format!("/proc/{pid}/mem").into());
    files
}

/// Files of ours in folders that all users share, that others may read or write. What is linked from nowhere has no place there.
fn exposed() -> BTreeSet<PathBuf> {
    let folders = ["/tmp", "/dev/shm", "/var/tmp", "/run"].into_iter().filter_map(|folder| fs::read_dir(folder).ok());
    let files = folders.flatten().flatten().map(|file| file.path());
    let is_exposed = |path: &PathBuf| {
        let is_ours = path.file_name().is_some_and(|name| name.to_string_lossy().contains("trapline"));
        is_ours && fs::symlink_metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o077 != 0)
    };
    files.filter(is_exposed).collect()
}

#[test]
fn another_user_opens_nothing_of_recorder_and_target() {
    if fs::metadata("/proc/self").is_ok_and(|process| process.uid() != 0) {
        assert!(std::env::var_os("CI").is_none(), "under CI, the tests run as root");
        eprintln!("left out: only root can become another user");
        return;
    }
    let folder = Scratch::new();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("a folder of our own");
    let words = Program::of(&["waiting.c"]).build(Optimised::Yes, folder.path());
    let trace = folder.join("trace");
    let before = exposed();
    let running = Command::new(words, folder.path()).behind(trapline::record(&trace, &["--lib", "*"])).start();
    wait_for(&folder.join("ready"));
    let target = *descendants(running.pid).first().expect("the recorder has a child");
    let shared = |pid: u32| -> Vec<PathBuf> {
        let files = files_of(pid).into_iter();
        files.filter(|file| fs::read_link(file).is_ok_and(|to| to.to_string_lossy().contains("trapline"))).collect()
    };
    assert!(shared(running.pid).len() >= 3, "agent, pool and stubs are open in the recorder");
    assert!(shared(target).len() >= 3, "agent, pool and stubs are mapped in the target");
    let files = [files_of(running.pid), files_of(target), vec![trace.clone()]].concat();
    assert_eq!(open_as_nobody(&files), Vec::<String>::new());
    // Negative control: what everybody may open is opened.
    let open = folder.join("open");
    fs::write(&open, "").expect("a file of our own");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o644)).expect("a file of our own");
    assert_eq!(open_as_nobody(std::slice::from_ref(&open)), [open.to_string_lossy()]);
    assert_eq!(exposed().difference(&before).collect::<Vec<_>>(), Vec::<&PathBuf>::new());
    fs::write(folder.join("over"), "").expect("a folder of our own");
    let outcome = running.finish();
    assert_eq!(outcome.end, End::Status(0), "{}", outcome.error_text());
    assert_eq!(exposed().difference(&before).collect::<Vec<_>>(), Vec::<&PathBuf>::new());
}

/// Looks at the mappings of all processes below a running command until it has ended. Returns how often it looked at a target, and the mappings that
/// were writable and executable. `seen` is called for each of these.
fn watch(running: Running, seen: impl Fn()) -> (u64, BTreeSet<String>) {
    let (mut looks, mut found) = (0, BTreeSet::new());
    let deadline = Instant::now() + PATIENCE;
    loop {
        // Then waiting for its end kills it, and fails.
        let is_late = Instant::now() > deadline;
        let processes = descendants(running.pid);
        for pid in &processes {
            let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
            looks += u64::from(maps.contains("trapline-agent"));
            let both = maps.lines().filter(|line| {
                let permissions = line.split(' ').nth(1).unwrap_or_default();
                permissions.contains('w') && permissions.contains('x')
            });
            for line in both {
                seen();
                found.insert(line.to_owned());
            }
        }
        if is_late || processes.is_empty() && running.has_ended() {
            let outcome = running.finish();
            assert_eq!(outcome.end, End::Status(0), "{} {}", outcome.text(), outcome.error_text());
            return (looks, found);
        }
    }
}

#[test]
fn no_page_is_writable_and_executable_at_any_time() {
    let folder = Scratch::new();
    let log = folder.join("log");
    let toggle = ["--toggle-every", "2", "--toggle-log", log.to_str().expect("a path that is UTF-8")];
    let loads = Program::of(&["dlopen.c"]).library(Library::Argument).build(Optimised::Yes, folder.path());
    let mut toggled = Program::of(&["toggled.c"]).build(Optimised::Yes, folder.path());
    toggled.push("log".into());
    let mut looks = 0;
    for (words, options) in [(loads, &["--lib", "*"][..]), (toggled, &toggle[..])] {
        let running =
            Command::new(words, folder.path()).behind(trapline::record(&folder.join("trace"), options)).start();
        let (count, found) = watch(running, || ());
        assert_eq!(found, BTreeSet::new());
        looks += count;
    }
    assert!(looks > 0, "no target was looked at while it had the agent");
}

#[test]
fn a_page_that_is_both_is_seen() {
    let folder = Scratch::new();
    let words = Program::of(&["writable_code.c"]).build(Optimised::Yes, folder.path());
    let running = Command::new(words, folder.path()).behind(trapline::record(&folder.join("trace"), &[])).start();
    let (_, found) = watch(running, || fs::write(folder.join("seen"), "").expect("a folder of our own"));
    assert_eq!(found.len(), 1, "{found:?}");
}
