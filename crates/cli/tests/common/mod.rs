//! What the tests of verbs that read traces share.
#![allow(dead_code, reason = "each test uses some of it")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use trapline_trace::{
    Function, Meta, Module, Stream, Writer,
    record::{
        Event::{self, Enter, Exit},
        encode,
    },
};

/// A directory for one test.
pub(crate) struct Directory(pub(crate) PathBuf);

impl Directory {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("trapline-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }

    pub(crate) fn trapline(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trapline"));
        self.confine(command.args(arguments)).output().expect("the command runs")
    }

    /// Has a command run here, without what people have decided.
    pub(crate) fn confine<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        for name in
            ["CI", "PAGER", "LESS", "NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "TRAPLINE_OUTPUT", "TRAPLINE_ON_FULL"]
        {
            command.env_remove(name);
        }
        command.current_dir(&self.0).env("XDG_CONFIG_HOME", &self.0).env("TERM", "xterm")
    }

    /// The status, and what a terminal shows, which `script` makes: both streams.
    pub(crate) fn on_terminal(&self, line: &str, environment: &[(&str, &str)]) -> (Option<i32>, String) {
        let mut command = Command::new("timeout");
        // The shell hands its place over: beside the command it would be interrupted, too, and end as one that was.
        let asked = format!("exec {} {line}", env!("CARGO_BIN_EXE_trapline"));
        command.args(["60", "script", "-qec", &asked, "/dev/null"]).stdin(Stdio::null());
        self.confine(&mut command).envs(environment.iter().copied());
        let output = command.output().expect("script runs");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What a command prints that has to succeed.
    pub(crate) fn text(&self, arguments: &[&str]) -> String {
        let output = self.trapline(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A trace of so many calls of `main`.
pub(crate) fn write_calls(path: &Path, calls: u64) {
    let events: Vec<_> =
        (0..calls).flat_map(|at| [(at * 100, Enter { site: 0 }), (at * 100 + 50, Exit { depth: 1 })]).collect();
    write_trace(path, &["main".to_owned()], &events);
}

/// A trace of one thread of `/bin/prog`; a tick is a nanosecond. Functions' sites are their places in the list.
pub(crate) fn write_trace(path: &Path, names: &[String], events: &[(u64, Event)]) {
    let meta = Meta { command: vec!["prog".into()], tsc_hz: 1_000_000_000, ..Meta::default() };
    let mut writer = Writer::create(path, &meta).expect("a trace");
    let functions: Vec<Function> =
        names.iter().map(|name| Function { name: name.clone(), ..Function::default() }).collect();
    let module = Module { id: 1, path: "/bin/prog", build_id: None, first_site: 0, functions: &functions };
    writer.module(&module).expect("a module");
    writer.stream(&Stream { id: 1, tid: 7, name: "prog".into(), ..Stream::default() }).expect("a stream");
    let (mut tsc, mut depth) = (events.first().map_or(0, |(tsc, _)| *tsc), 0);
    for events in events.chunks(1000) {
        let records: Vec<u64> = events.iter().map(|(tsc, event)| encode(*event, *tsc)).collect();
        let end = writer.events(1, tsc, depth, 0, &records).expect("events");
        (tsc, depth) = (end.tsc, end.depth);
    }
    writer.finish().expect("the end");
}
