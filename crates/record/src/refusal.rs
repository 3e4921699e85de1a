//! Why a process that runs cannot be recorded.
//!
//! Owns [`Refusal`], every reason with what to do about it, and [`examine`], which looks at a process from outside: nothing of it is touched. Who wants to
//! record it hears the same words as who only asks. Invariant: a process that is refused was not changed.

use std::{
    fmt, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use object::{Endianness, FileKind, elf, read::elf::FileHeader};

use crate::sys::{Tid, spawn};

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
                write!(f, "it runs as another user ({user}); run trapline as that user, by `sudo -u '#{user}'`")
            }
            Self::OtherNamespace => {
                f.write_str("it is in a container (another mount or pid namespace); run trapline there, by `nsenter`")
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
            Self::Bits32 => f.write_str("it is a 32-bit program, which this version cannot record yet"),
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

/// Looks at a process from outside. `None` if nothing is in the way as far as can be seen there.
pub fn examine(pid: Tid) -> Option<Refusal> {
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { return Some(Refusal::NoSuchProcess) };
    let of_process = Status(status).of_process(pid);
    of_process.or_else(|| of_program(&PathBuf::from(format!("/proc/{pid}/exe"))))
}

/// Why the kernel did not let us trace a thread of a process.
pub(crate) fn why_forbidden(pid: Tid) -> Refusal {
    const CAP_SYS_PTRACE: u32 = 19;
    if let Some(refusal) = examine(pid) {
        return refusal;
    }
    let own = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let capabilities = own.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = capabilities.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(0);
    if capabilities >> CAP_SYS_PTRACE & 1 == 1 {
        return Refusal::Forbidden;
    }
    if fs::metadata(format!("/proc/{pid}")).is_ok_and(|process| process.uid() != spawn::user()) {
        return Refusal::NotDumpable;
    }
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    match scope.trim().parse() {
        Ok(scope) if scope > 0 => Refusal::PtraceScope { scope },
        _ => Refusal::Forbidden,
    }
}

/// A process's `status`.
struct Status(String);

impl Status {
    fn field(&self, name: &str) -> &str {
        let value = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.unwrap_or_default().trim()
    }

    fn of_process(&self, pid: Tid) -> Option<Refusal> {
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
        let state = self.field("State");
        let threads: u32 = self.field("Threads").parse().unwrap_or(1);
        // The first thread may have ended before the others.
        if state.starts_with(['Z', 'X']) && threads <= 1 {
            return Some(Refusal::Zombie);
        }
        let tracer = self.field("TracerPid").parse().unwrap_or(0);
        if tracer != 0 && tracer != spawn::own_tid() {
            let name = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
            return Some(Refusal::Traced { tracer, name: name.trim_end().to_owned() });
        }
        if state.starts_with('T') {
            return Some(Refusal::Stopped);
        }
        let users = self.field("Uid").split_whitespace().filter_map(|user| user.parse().ok());
        if let Some(user) = users.into_iter().find(|user| *user != spawn::user()) {
            return Some(Refusal::OtherUser { user });
        }
        if ["mnt", "pid"].into_iter().any(|kind| is_elsewhere(pid, kind)) {
            return Some(Refusal::OtherNamespace);
        }
        if !["", "0"].contains(&self.field("Seccomp")) {
            return Some(Refusal::Sandbox);
        }
        self.field("x86_Thread_features").contains("shstk").then_some(Refusal::ShadowStack)
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
    use object::read::elf::ProgramHeader;
    let bytes = fs::read(path).ok()?;
    if FileKind::parse(&*bytes) == Ok(FileKind::Elf32) {
        return Some(Refusal::Bits32);
    }
    let header = elf::FileHeader64::<Endianness>::parse(&*bytes).ok()?;
    let endian = header.endian().ok()?;
    let names = header.sections(endian, &*bytes).ok();
    let is_go = names.is_some_and(|sections| {
        let is_of_go = |name: &[u8]| name == b".note.go.buildid" || name == b".gopclntab";
        sections.iter().any(|section| sections.section_name(endian, section).is_ok_and(is_of_go))
    });
    if is_go {
        return Some(Refusal::Go);
    }
    let headers = header.program_headers(endian, &*bytes).ok()?;
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
        assert!(!is_kernel_thread(own));
    }

    #[test]
    fn this_program_has_a_dynamic_linker() {
        assert_eq!(of_program("/proc/self/exe".as_ref()), None);
    }
}
