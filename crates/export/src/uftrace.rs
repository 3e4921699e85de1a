//! uftrace's data directory: a file of 16-byte records a thread, and text files that say what processes and addresses are.
//!
//! Owns [`Uftrace`]. Modules are laid out in an address space that is the same in all processes, 4 GiB each, so that one map serves all. A process that runs one program is a
//! session. Invariant: `info` and `task.txt` come last, so that a directory without them is an export that was not finished.
//!
//! The format is that of uftrace's `uftrace.h` and `cmds/info.c`, version 4.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs::OpenOptions,
    io::{self, BufWriter, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
};

use trapline_trace::Process;

use crate::{
    source::{Call, Enter, Output, Thread, Trace},
    target::create,
};

const VERSION: u32 = 4;
const HEADER_BYTES: u16 = 40;
const LITTLE_ENDIAN: u8 = 1;
const CLASS_64_BIT: u8 = 2;

/// `TASK_SESSION`, `SYM_REL_ADDR`, `MAX_STACK`: there are sessions, symbols' addresses count from their module's start, and the deepest stack is told.
const FEATURES: u64 = 1 << 1 | 1 << 5 | 1 << 6;

/// `EXE_NAME`, `CMDLINE`, `TASKINFO`, `VERSION`: the lines of the info file, in this order.
const LINES: u64 = 1 | 1 << 3 | 1 << 7 | 1 << 13;

/// Of a record's second word: kind in two bits, this in three from bit 3, depth in ten from bit 6, address in 48.
const MAGIC: u64 = 5 << 3;
const ENTRY: u64 = 0;
const EXIT: u64 = 1;
const DEPTH_SHIFT: u32 = 6;
const MAX_DEPTH: u64 = (1 << 10) - 1;
const ADDRESS_SHIFT: u32 = 16;

/// Of address space, for each module.
const MODULE_BYTES: u64 = 1 << 32;

/// Where functions lie whose addresses nobody knows.
const UNKNOWN_ADDRESS: u64 = 1 << 31;

/// The last line of a map. Where the stack is tells uftrace where the kernel begins; without it, every address is the kernel's.
const STACK: &str = "7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0                          [stack]\n";

/// See the module's text.
pub(crate) struct Uftrace {
    directory: PathBuf,
    records: Option<BufWriter<std::fs::File>>,
    modules: BTreeMap<String, u64>,
    /// Of the functions, in the address space that was laid out.
    addresses: Vec<u64>,
    tids: BTreeSet<u32>,
    /// With the processes' threads.
    sessions: BTreeMap<u32, (Process, u32, BTreeSet<u32>)>,
    deepest: u64,
}

impl Uftrace {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            records: None,
            modules: BTreeMap::new(),
            addresses: Vec::new(),
            tids: BTreeSet::new(),
            sessions: BTreeMap::new(),
            deepest: 0,
        }
    }

    fn address(&mut self, trace: &Trace, function: u32) -> u64 {
        for (number, known) in (0_u64..).zip(&trace.functions).skip(self.addresses.len()) {
            let count = self.modules.len() as u64;
            let base = *self.modules.entry(known.path.clone()).or_insert((count + 1) * MODULE_BYTES);
            let offset = if known.address == 0 { UNKNOWN_ADDRESS + number * 16 } else { known.address % MODULE_BYTES };
            self.addresses.push(base + offset);
        }
        self.addresses[function as usize]
    }

    fn record(&mut self, trace: &Trace, kind: u64, function: u32, depth: usize, ns: u64) -> io::Result<()> {
        let depth = (depth as u64).min(MAX_DEPTH);
        self.deepest = self.deepest.max(depth);
        let address = self.address(trace, function);
        let word = kind | MAGIC | depth << DEPTH_SHIFT | address << ADDRESS_SHIFT;
        let Some(records) = &mut self.records else { return Ok(()) };
        records.write_all(&ns.to_le_bytes())?;
        records.write_all(&word.to_le_bytes())
    }

    fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        create(&self.directory.join(name))?.write_all(content)
    }

    /// The modules' symbols, and the map that all sessions have.
    fn write_symbols(&self, trace: &Trace) -> io::Result<String> {
        let mut map = String::new();
        let mut names = BTreeSet::new();
        for (path, base) in &self.modules {
            let name = path.rsplit('/').next().unwrap_or_default();
            // Symbols are found by the file's name alone.
            let number = base / MODULE_BYTES;
            let (path, name) = if names.insert(name) {
                (path.clone(), name.to_owned())
            } else {
                (format!("{path}.{number}"), format!("{name}.{number}"))
            };
            let last = base + MODULE_BYTES - 1;
            let _ = writeln!(map, "{base:012x}-{last:012x} r-xp 00000000 00:00 0                          {path}");
            let functions = trace.functions.iter().zip(&self.addresses);
            let own = functions.filter(|(_, address)| *address / MODULE_BYTES == number);
            let symbols: BTreeMap<u64, &str> =
                own.map(|(function, address)| (address % MODULE_BYTES, function.name.as_str())).collect();
            let mut text = format!("# symbols: {}\n# path name: {path}\n", symbols.len());
            for (address, name) in &symbols {
                let _ = writeln!(text, "{address:016x} T {}", name.replace(['\n', '\r'], " "));
            }
            let end = symbols.last_key_value().map_or(0, |(address, _)| address + 16);
            let _ = writeln!(text, "{end:016x} ? __sym_end");
            self.write(&format!("{name}.sym"), text.as_bytes())?;
        }
        Ok(map + STACK)
    }

    fn info(&self, trace: &Trace) -> Vec<u8> {
        let mut info = b"Ftrace!\0".to_vec();
        info.extend(VERSION.to_le_bytes());
        info.extend(HEADER_BYTES.to_le_bytes());
        info.extend([LITTLE_ENDIAN, CLASS_64_BIT]);
        info.extend(FEATURES.to_le_bytes());
        info.extend(LINES.to_le_bytes());
        info.extend(u16::try_from(self.deepest + 1).unwrap_or(u16::MAX).to_le_bytes());
        info.resize(usize::from(HEADER_BYTES), 0);
        let command = trace.catalog.meta.as_ref().map(|meta| meta.command.join(" ")).unwrap_or_default();
        let program = self.sessions.values().next().map_or("", |(process, ..)| process.executable.as_str());
        let tids: Vec<String> = self.tids.iter().map(u32::to_string).collect();
        let text = format!(
            "exename:{program}\ncmdline:{}\ntaskinfo:lines=2\ntaskinfo:nr_tid={}\ntaskinfo:tids={}\nuftrace_version:trapline {}\n",
            command.replace('\n', " "),
            tids.len(),
            tids.join(","),
            env!("CARGO_PKG_VERSION")
        );
        info.extend(text.as_bytes());
        info
    }
}

impl Output for Uftrace {
    fn thread(&mut self, _: &Trace, thread: &Thread) -> io::Result<()> {
        // After an exec, a thread goes on in the same file.
        let path = self.directory.join(format!("{}.dat", thread.tid));
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        self.records = Some(BufWriter::with_capacity(1 << 16, file));
        self.tids.insert(thread.tid);
        let session = (thread.process.clone(), thread.pid, BTreeSet::new());
        self.sessions.entry(thread.process.id).or_insert(session).2.insert(thread.tid);
        Ok(())
    }

    fn enter(&mut self, trace: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.record(trace, ENTRY, enter.function, enter.depth, enter.start_ns)
    }

    fn leave(&mut self, trace: &Trace, _: &Thread, call: Call) -> io::Result<()> {
        self.record(trace, EXIT, call.function, call.depth, call.end_ns)
    }

    fn point(&mut self, trace: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.record(trace, ENTRY, enter.function, enter.depth, enter.start_ns)?;
        self.record(trace, EXIT, enter.function, enter.depth, enter.start_ns)
    }

    fn thread_end(&mut self, _: &Trace, _: &Thread) -> io::Result<()> {
        self.records.take().map_or(Ok(()), |mut records| records.flush())
    }

    fn end(self, trace: &Trace) -> io::Result<()> {
        let map = self.write_symbols(trace)?;
        let mut tasks = String::new();
        for (id, (process, pid, tids)) in &self.sessions {
            let start_ns = trace.clock.since_start_ns(process.started_tsc);
            let timestamp = format!("{}.{:09}", start_ns / 1_000_000_000, start_ns % 1_000_000_000);
            let _ = writeln!(
                tasks,
                "SESS timestamp={timestamp} pid={pid} sid={id:016x} exename=\"{}\"",
                process.executable
            );
            for tid in tids {
                let _ = writeln!(tasks, "TASK timestamp={timestamp} tid={tid} pid={pid}");
            }
            self.write(&format!("sid-{id:016x}.map"), map.as_bytes())?;
        }
        self.write("task.txt", tasks.as_bytes())?;
        self.write("info", &self.info(trace))
    }
}
