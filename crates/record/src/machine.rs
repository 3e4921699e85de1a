//! What of a machine is in the way of recording programs on it.
//!
//! Owns [`look`], which tries out what the recorder needs, on nobody but a child of its own, and [`code_can_be_changed`], the part of it that `record` asks
//! beforehand. What keeps single processes from being recorded is [`refusal`]'s, and told in its words. Invariant: nothing is left behind.

use std::{fs, io};

use trapline_engine::{Addr, Mode};

use crate::{
    agent::Agent,
    refusal::{self, Refusal},
    sys::{
        memory::Memory,
        ptrace,
        shared::{self, SharedMemory},
        spawn,
    },
};

/// How much something is in the way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Level {
    /// Not at all.
    Fine,
    /// Some processes cannot be recorded, or not everything of them.
    Limits,
    /// Nothing can be recorded.
    Prevents,
}

/// Something that was looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// What: a word that stays the same.
    pub name: &'static str,
    /// How much it is in the way.
    pub level: Level,
    /// What was found, and what to do if that is in the way.
    pub text: String,
}

/// The first kernel whose membarrier synchronises cores.
const FIRST_KERNEL: (u32, u32) = (4, 16);

/// What a recording shares with a process if nothing else is asked for.
const SHARED_BYTES: usize = 128 << 20;

/// Looks at everything.
pub fn look() -> Vec<Finding> {
    let status = read("/proc/thread-self/status");
    vec![
        kernel(&read("/proc/sys/kernel/osrelease")),
        tracing(code_can_be_changed()),
        scope(&read("/proc/sys/kernel/yama/ptrace_scope"), refusal::may_trace_all()),
        sandbox(refusal::field_of(&status, "Seccomp")),
        barrier(shared::can_sync_cores()),
        memory(SharedMemory::new(c"trapline", SHARED_BYTES).map(drop), &read("/proc/sys/vm/memfd_noexec")),
        clock(&read("/proc/cpuinfo")),
        narrow(fs::exists("/proc/sys/abi/vsyscall32").unwrap_or(false)),
    ]
}

/// Whether the kernel lets a tracer change code, tried out on a child that ends at once.
///
/// # Errors
/// [`Refusal::CodeForbidden`] if it does not, [`Refusal::Forbidden`] if it does not let us trace.
pub fn code_can_be_changed() -> Result<(), Refusal> {
    /// Lies where nobody may write, in the child as here.
    static READ_ONLY: [u8; 8] = *b"trapline";
    let other = |error: io::Error| Refusal::Other(format!("starting a process failed: {error}"));
    let child = spawn::spawn_idle().map_err(other)?;
    let result = ptrace::seize(child.pid).map_err(|_| Refusal::Forbidden).and_then(|()| {
        let memory = Memory::open(child.pid).map_err(|_| Refusal::Forbidden)?;
        let at = Addr::new(std::ptr::from_ref(&READ_ONLY).addr() as u64);
        memory.write(at, &READ_ONLY).map_err(|_| Refusal::CodeForbidden)
    });
    let pid = child.pid;
    drop(child);
    // An error means that it is gone.
    let _ = ptrace::wait_for_end(pid);
    result
}

fn finding(name: &'static str, level: Level, text: impl Into<String>) -> Finding {
    Finding { name, level, text: text.into() }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn kernel(release: &str) -> Finding {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < FIRST_KERNEL {
        return finding("kernel", Level::Prevents, format!("Linux {release}; trapline needs 4.16 or later"));
    }
    finding("kernel", Level::Fine, format!("Linux {release}"))
}

fn tracing(tried: Result<(), Refusal>) -> Finding {
    match tried {
        Ok(()) => finding("ptrace", Level::Fine, "a child can be traced, and its code changed"),
        Err(reason) => finding("ptrace", Level::Prevents, reason.to_string()),
    }
}

fn scope(scope: &str, may_trace_all: bool) -> Finding {
    /// Only who has `CAP_SYS_PTRACE` traces what runs already; above it, nobody (Documentation/admin-guide/LSM/Yama.rst).
    const ADMIN_ONLY: u32 = 2;
    let scope: u32 = scope.parse().unwrap_or(0);
    match (scope, may_trace_all) {
        (0, true) => finding("running-processes", Level::Fine, "all can be traced"),
        (0, false) => finding("running-processes", Level::Fine, "those of this user can be traced"),
        (1..=ADMIN_ONLY, true) => finding("running-processes", Level::Fine, "all can be traced, by CAP_SYS_PTRACE"),
        _ => finding("running-processes", Level::Limits, Refusal::PtraceScope { scope }.to_string()),
    }
}

fn sandbox(mode: &str) -> Finding {
    if ["", "0"].contains(&mode) {
        return finding("sandbox", Level::Fine, "trapline is in none");
    }
    let text = "trapline itself is in a sandbox (seccomp), which programs that it starts share; if something is forbidden there, try it outside of the container";
    finding("sandbox", Level::Limits, text)
}

fn barrier(can_sync_cores: bool) -> Finding {
    if can_sync_cores {
        return finding("membarrier", Level::Fine, "cores can be synchronised");
    }
    let text = "cores cannot be synchronised, which is needed to switch functions on and off in a program that runs: use a kernel with CONFIG_MEMBARRIER, and let membarrier pass a seccomp filter";
    finding("membarrier", Level::Limits, text)
}

fn memory(tried: io::Result<()>, noexec: &str) -> Finding {
    match tried {
        Ok(()) => finding("shared-memory", Level::Fine, format!("{} MiB can be shared", SHARED_BYTES >> 20)),
        Err(error) if noexec == "2" => finding(
            "shared-memory",
            Level::Prevents,
            format!("memory that holds code cannot be shared ({error}); set the sysctl vm.memfd_noexec to 1"),
        ),
        Err(error) => finding(
            "shared-memory",
            Level::Prevents,
            format!("memory cannot be shared ({error}); see `ulimit -a`, and allow memfd_create in the sandbox"),
        ),
    }
}

fn clock(cpuinfo: &str) -> Finding {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    if has("constant_tsc") && (has("nonstop_tsc") || has("hypervisor")) {
        return finding("clock", Level::Fine, "the time-stamp counter is steady");
    }
    finding("clock", Level::Limits, "the time-stamp counter changes its pace; durations in traces are not exact")
}

fn narrow(runs_32_bit: bool) -> Finding {
    if runs_32_bit && Agent::injected(Mode::Bits32).is_none() {
        return finding(
            "32-bit",
            Level::Limits,
            "the kernel runs 32-bit programs, and this trapline was built without the agent for those; add the target by `rustup target add i686-unknown-linux-gnu` and build trapline again",
        );
    }
    if runs_32_bit {
        return finding("32-bit", Level::Fine, "the kernel runs 32-bit programs, and they can be recorded");
    }
    finding("32-bit", Level::Fine, "the kernel runs no 32-bit programs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_old_or_new_enough() {
        for (release, level) in [
            ("4.15.18-generic", Level::Prevents),
            ("3.10.0", Level::Prevents),
            ("4.16.0", Level::Fine),
            ("5.4-rc1", Level::Fine),
            ("6.18.44-x", Level::Fine),
        ] {
            assert_eq!(kernel(release).level, level, "{release}");
        }
    }

    #[test]
    fn what_yama_forbids_depends_on_who_asks() {
        for (value, all, level) in [
            ("", false, Level::Fine),
            ("0", false, Level::Fine),
            ("1", false, Level::Limits),
            ("1", true, Level::Fine),
            ("2", true, Level::Fine),
            ("3", true, Level::Limits),
        ] {
            assert_eq!(scope(value, all).level, level, "{value} {all}");
        }
        assert!(scope("1", false).text.contains("ptrace_scope is 1"));
    }

    #[test]
    fn what_fails_is_told_with_what_to_do() {
        assert!(tracing(Err(Refusal::CodeForbidden)).text.contains("force_override"));
        let denied = || Err(io::Error::from_raw_os_error(libc::EACCES));
        assert!(memory(denied(), "2").text.contains("vm.memfd_noexec"));
        assert!(memory(denied(), "0").text.contains("ulimit"));
        assert_eq!(sandbox("2").level, Level::Limits);
        assert_eq!(barrier(false).level, Level::Limits);
        assert_eq!(clock("flags\t\t: fpu tsc").level, Level::Limits);
        assert_eq!(clock("flags\t\t: fpu constant_tsc nonstop_tsc").level, Level::Fine);
    }

    #[test]
    fn this_machine_is_good_enough() {
        assert_eq!(code_can_be_changed(), Ok(()));
        let found = look();
        assert!(found.iter().all(|finding| finding.level < Level::Prevents), "{found:?}");
    }
}
