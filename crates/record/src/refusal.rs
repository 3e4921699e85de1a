//! Why a process that runs cannot be recorded.
//!
//! Owns [`Refusal`], every reason with what to do about it, [`examine`], which looks at a process from outside, and [`diagnose`], which goes on where `examine`
//! stops: nothing of the process is touched. Who wants to record it hears the same words as who only asks. Invariant: a process that is refused was not changed.

use std::{
    fmt, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use object::{
    Endianness, FileKind, elf,
    read::elf::{FileHeader, ProgramHeader},
};
use trapline_engine::Mode;

use crate::{
    agent::Agent,
    arm::NO_NARROW_AGENT,
    sys::{Tid, spawn, width},
};

/// Why a process cannot be recorded. The text says what to do.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Refusal {
    /// There is no process of this number.
    NoSuchProcess,
    /// It is a thread of this process, and not its first one.
    Thread {
        /// The process.
        process: Tid,
    },
    /// It is ourselves.
    Itself,
    /// It is one of the kernel's.
    KernelThread,
    /// It has ended, and its parent has not asked for its status yet.
    Zombie,
    /// It ended while we came.
    Ended,
    /// A signal has stopped it.
    Stopped,
    /// Somebody traces it.
    Traced {
        /// Who.
        tracer: Tid,
        /// The tracer's name.
        name: String,
    },
    /// It runs as another user.
    OtherUser {
        /// Whose it is.
        user: u32,
    },
    /// It has other rights than who started it.
    ChangedUser {
        /// Who started it.
        user: u32,
        /// Whose rights it has.
        rights: u32,
    },
    /// It sees other processes or files than we do.
    OtherNamespace,
    /// It may not be traced, though it is this user's.
    NotDumpable,
    /// The system allows to trace children only, or nothing.
    PtraceScope {
        /// `kernel.yama.ptrace_scope`.
        scope: u32,
    },
    /// The kernel says no, and we do not know why.
    Forbidden,
    /// The kernel lets nobody change code, not even who traces.
    CodeForbidden,
    /// It is a 64-bit program, and we are none.
    Bits64,
    /// It is a 32-bit program.
    Bits32,
    /// It has no dynamic linker.
    Static,
    /// It is written in Go.
    Go,
    /// It has forbidden itself system calls.
    Sandbox,
    /// Its return addresses are watched by the processor.
    ShadowStack,
    /// It uses the segment that the agent needs.
    SegmentInUse {
        /// A thread that does.
        thread: Tid,
    },
    /// Something else.
    Other(String),
}

impl Refusal {
    /// Whether it is a recorder of ours that is in the way.
    pub(crate) fn is_of_recorder(&self) -> bool {
        matches!(self, Self::Traced { name, .. } if name == "trapline")
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchProcess => f.write_str("there is no such process; `ps` or `pgrep` tells the number"),
            Self::Thread { process } => write!(f, "it is a thread of process {process}; give that number, all threads are recorded"),
            Self::Itself => f.write_str("it is trapline itself; give another number"),
            Self::KernelThread => f.write_str("it is a thread of the kernel, which has no program to record"),
            Self::Zombie => f.write_str("it has ended already, and waits for its parent to take notice (a zombie)"),
            Self::Ended => f.write_str("it ended meanwhile"),
            Self::Stopped => f.write_str("it is stopped by a signal; let it go on first, by `kill -CONT`"),
            Self::Traced { tracer, name } => write!(
                f,
                "process {tracer} ({name}) traces it already, and there can be one tracer only; end that first (gdb: `detach`)"
            ),
            Self::OtherUser { user } => {
                write!(f, "it runs as another user ({user}); run trapline as root, or as that user, by `sudo -u '#{user}'`")
            }
            Self::ChangedUser { user, rights } => write!(
                f,
                "user {user} started it and it has the rights of user {rights} (setuid); record the program as that user, by `sudo -u '#{rights}' trapline record`"
            ),
            Self::OtherNamespace => {
                f.write_str("it is in a container (another mount or pid namespace); run trapline with CAP_SYS_PTRACE, or there, by `nsenter`")
            }
            Self::NotDumpable => f.write_str(
                "it may not be traced: it has changed its user or holds secrets (PR_SET_DUMPABLE); run trapline with CAP_SYS_PTRACE",
            ),
            Self::PtraceScope { scope } => write!(
                f,
                "the system does not allow it (the sysctl kernel.yama.ptrace_scope is {scope}); run trapline with CAP_SYS_PTRACE, or launch the program by `trapline record`"
            ),
            Self::Forbidden => f.write_str(
                "the kernel does not allow to trace it (a seccomp filter or a security module); try it outside of the container",
            ),
            Self::CodeForbidden => f.write_str(
                "the kernel does not let even a tracer change code through /proc/PID/mem; boot it with proc_mem.force_override=ptrace",
            ),
            Self::Bits64 => f.write_str(width::TOO_WIDE),
            Self::Bits32 => f.write_str(NO_NARROW_AGENT),
            Self::Static => f.write_str("it is linked statically, which this version cannot record; link it dynamically"),
            Self::Go => f.write_str("it is a Go program, whose stacks move; this version cannot record those"),
            Self::Sandbox => f.write_str(
                "it has forbidden itself system calls (seccomp), and the agent might be killed for one; launch it by `trapline record`, which is told beforehand",
            ),
            Self::ShadowStack => f.write_str(
                "the processor watches its return addresses (a shadow stack); start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off",
            ),
            Self::SegmentInUse { thread } => {
                write!(f, "its thread {thread} uses the gs segment, which the agent needs; launch it by `trapline record`")
            }
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl Refusal {
    /// A word for programs that read it; it stays the same when the text changes.
    pub fn name(&self) -> &'static str {
        match self {
            Self::NoSuchProcess => "no-such-process",
            Self::Thread { .. } => "thread",
            Self::Itself => "itself",
            Self::KernelThread => "kernel-thread",
            Self::Zombie => "zombie",
            Self::Ended => "ended",
            Self::Stopped => "stopped",
            Self::Traced { .. } => "traced",
            Self::OtherUser { .. } => "other-user",
            Self::ChangedUser { .. } => "setuid",
            Self::OtherNamespace => "other-namespace",
            Self::NotDumpable => "not-dumpable",
            Self::PtraceScope { .. } => "ptrace-scope",
            Self::Forbidden => "forbidden",
            Self::CodeForbidden => "code-forbidden",
            Self::Bits64 => "64-bit",
            Self::Bits32 => "32-bit",
            Self::Static => "static",
            Self::Go => "go",
            Self::Sandbox => "seccomp",
            Self::ShadowStack => "shadow-stack",
            Self::SegmentInUse { .. } => "segment-in-use",
            Self::Other(_) => "other",
        }
    }
}

/// Whether a recorder of ours traces a process, be it about to come, there, or about to leave.
pub(crate) fn is_recorded(pid: Tid) -> bool {
    examine(pid).is_some_and(|refusal| refusal.is_of_recorder())
}

/// Looks at a process from outside. `None` if nothing is in the way as far as can be seen there.
pub fn examine(pid: Tid) -> Option<Refusal> {
    everything(pid).into_iter().next()
}

/// Looks for everything that is in the way of recording a process, and asks the kernel whether it may be traced. Empty if it can be recorded, as far as can be
/// seen without stopping it.
pub fn diagnose(pid: Tid) -> Vec<Refusal> {
    let mut found = everything(pid);
    if found.is_empty() {
        // What is asked of whoever opens it is what is asked of who traces (proc(5), PTRACE_MODE_ATTACH_FSCREDS).
        match fs::File::open(format!("/proc/{pid}/mem")).map_err(|error| error.raw_os_error()) {
            Ok(_) => {}
            // It has no memory any more.
            Err(Some(libc::ESRCH | libc::ENOENT)) => found.push(Refusal::Ended),
            Err(_) => found.push(why_forbidden(pid)),
        }
    }
    if status_of(pid).is_none() && found != [Refusal::NoSuchProcess] {
        return vec![Refusal::Ended];
    }
    found
}

fn status_of(pid: Tid) -> Option<Status> {
    fs::read_to_string(format!("/proc/{pid}/status")).ok().map(Status)
}

/// Everything that is in the way, what weighs most first.
fn everything(pid: Tid) -> Vec<Refusal> {
    let Some(status) = status_of(pid) else { return vec![Refusal::NoSuchProcess] };
    if let Some(refusal) = status.no_program(pid) {
        return vec![refusal];
    }
    let of_program = of_program(&PathBuf::from(format!("/proc/{pid}/exe")));
    status.of_process(pid, may_trace_all()).into_iter().chain(of_program).collect()
}

/// Why the kernel did not let us trace a thread of a process.
pub(crate) fn why_forbidden(pid: Tid) -> Refusal {
    if let Some(refusal) = examine(pid) {
        return refusal;
    }
    if may_trace_all() {
        return Refusal::Forbidden;
    }
    // What is in the folder of such a process is root's; the folder itself is its own (proc(5)).
    if fs::metadata(format!("/proc/{pid}/status")).is_ok_and(|process| process.uid() != spawn::user()) {
        return Refusal::NotDumpable;
    }
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    match scope.trim().parse() {
        Ok(scope) if scope > 0 => Refusal::PtraceScope { scope },
        _ => Refusal::Forbidden,
    }
}

/// Whether we have `CAP_SYS_PTRACE`.
pub(crate) fn may_trace_all() -> bool {
    const CAP_SYS_PTRACE: u32 = 19;
    let own = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    u64::from_str_radix(field_of(&own, "CapEff"), 16).is_ok_and(|set| set >> CAP_SYS_PTRACE & 1 == 1)
}

/// A field of a `status`, or nothing.
pub(crate) fn field_of<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or_default().trim()
}

/// A process's `status`.
struct Status(String);

impl Status {
    fn field(&self, name: &str) -> &str {
        field_of(&self.0, name)
    }

    /// Why there is no program of its own to record.
    fn no_program(&self, pid: Tid) -> Option<Refusal> {
        let process = self.field("Tgid").parse().unwrap_or(pid);
        if process == std::process::id().cast_signed() {
            return Some(Refusal::Itself);
        }
        if process != pid {
            return Some(Refusal::Thread { process });
        }
        if is_kernel_thread(pid) {
            return Some(Refusal::KernelThread);
        }
        let threads: u32 = self.field("Threads").parse().unwrap_or(1);
        // The first thread may have ended before the others.
        (self.field("State").starts_with(['Z', 'X']) && threads <= 1).then_some(Refusal::Zombie)
    }

    /// What is in the way, for who may trace all or not: the kernel asks those no more than that.
    fn of_process(&self, pid: Tid, may_trace_all: bool) -> Vec<Refusal> {
        let mut found = Vec::new();
        let tracer = self.field("TracerPid").parse().unwrap_or(0);
        if tracer != 0 && tracer != spawn::own_tid() {
            let name = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
            found.push(Refusal::Traced { tracer, name: name.trim_end().to_owned() });
        }
        // Not `t`: that is by its tracer.
        if self.field("State").starts_with('T') {
            found.push(Refusal::Stopped);
        }
        // Real, effective, saved, of files.
        let users: Vec<u32> = self.field("Uid").split_whitespace().filter_map(|user| user.parse().ok()).collect();
        if let ([user, rights, ..], false) = (&users[..], may_trace_all) {
            let (user, rights) = (*user, *rights);
            if user != rights {
                found.push(Refusal::ChangedUser { user, rights });
            } else if let Some(&user) = users.iter().find(|user| **user != spawn::user()) {
                found.push(Refusal::OtherUser { user });
            }
        }
        if !may_trace_all && ["mnt", "pid"].into_iter().any(|kind| is_elsewhere(pid, kind)) {
            found.push(Refusal::OtherNamespace);
        }
        if !["", "0"].contains(&self.field("Seccomp")) {
            found.push(Refusal::Sandbox);
        }
        if self.field("x86_Thread_features").contains("shstk") {
            found.push(Refusal::ShadowStack);
        }
        found
    }
}

fn is_elsewhere(pid: Tid, kind: &str) -> bool {
    let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/{kind}")).ok();
    let (own, its) = (namespace("self"), namespace(&pid.to_string()));
    its.is_some() && own != its
}

fn is_kernel_thread(pid: Tid) -> bool {
    const PF_KTHREAD: u64 = 0x20_0000;
    /// Of `flags`, behind the name.
    const FIELD: usize = 6;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let flags = stat.rsplit_once(") ").and_then(|(_, fields)| fields.split(' ').nth(FIELD)?.parse().ok());
    flags.is_some_and(|flags: u64| flags & PF_KTHREAD != 0)
}

/// What of a program's file is in the way.
fn of_program(path: &Path) -> Option<Refusal> {
    let bytes = fs::read(path).ok()?;
    if FileKind::parse(&*bytes) != Ok(FileKind::Elf32) {
        if width::is_too_wide(Mode::Bits64) {
            return Some(Refusal::Bits64);
        }
        return of_headers::<elf::FileHeader64<Endianness>>(&bytes);
    }
    if Agent::injected(Mode::Bits32).is_none() {
        return Some(Refusal::Bits32);
    }
    of_headers::<elf::FileHeader32<Endianness>>(&bytes)
}

fn of_headers<H: FileHeader<Endian = Endianness>>(bytes: &[u8]) -> Option<Refusal> {
    let header = H::parse(bytes).ok()?;
    let endian = header.endian().ok()?;
    let names = header.sections(endian, bytes).ok();
    let is_go = names.is_some_and(|sections| {
        let is_of_go = |name: &[u8]| name == b".note.go.buildid" || name == b".gopclntab";
        sections.iter().any(|section| sections.section_name(endian, section).is_ok_and(is_of_go))
    });
    if is_go {
        return Some(Refusal::Go);
    }
    let headers = header.program_headers(endian, bytes).ok()?;
    let is_dynamic = headers.iter().any(|header| header.p_type(endian) == elf::PT_INTERP);
    (!is_dynamic).then_some(Refusal::Static)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_program_of_its_own_is_refused() {
        let own = std::process::id().cast_signed();
        assert_eq!(examine(own), Some(Refusal::Itself));
        assert_eq!(examine(i32::MAX), Some(Refusal::NoSuchProcess));
        assert_eq!(diagnose(i32::MAX), [Refusal::NoSuchProcess]);
        assert!(!is_kernel_thread(own));
    }

    #[test]
    fn everything_is_told_that_a_status_shows() {
        let own = std::process::id().cast_signed();
        let other = spawn::user() + 1;
        let status = |text: &str| Status(format!("{text}\nSeccomp:\t0\n")).of_process(own, false);
        assert_eq!(status(&format!("State:\tS\nUid:\t{0}\t{0}\t{0}\t{0}", spawn::user())), []);
        let changed = Refusal::ChangedUser { user: other, rights: spawn::user() };
        assert_eq!(
            status(&format!("State:\tT (stopped)\nUid:\t{other}\t{0}\t{0}\t{0}", spawn::user())),
            [Refusal::Stopped, changed]
        );
        assert_eq!(status("State:\tt (tracing stop)\nx86_Thread_features:\tshstk wrss"), [Refusal::ShadowStack]);
    }

    #[test]
    fn this_program_has_a_dynamic_linker() {
        assert_eq!(of_program("/proc/self/exe".as_ref()), None);
    }
}
