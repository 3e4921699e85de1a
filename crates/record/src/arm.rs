//! From a loaded image to armed functions.
//!
//! Owns [`Armory`], what is known of files across all processes: their functions, their site ids, the agent. Upstream is the [tracer](crate::tracer), which has stopped the thread that is armed for; downstream
//! [`trapline_image`] decides and encodes, and a [`Space`] is written to. Invariants: stubs stand before a site leads to them, and stay; a
//! site's bytes are compared with the file's before the first write (I5); stubs are readable and executable, never writable (I8).

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    fs::{self, File},
    io,
    mem::offset_of,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use trapline_abi::{
    agent::{Config, SANDBOX_FUNCTIONS, symbol},
    counters::MAX_COUNTED_SITES,
    record::MAX_SITES,
};
use trapline_engine::{
    Addr, AddrRange, Filter, Mode,
    insn::{CALL_BYTES, InsnBytes, encode},
};
use trapline_image::{ArmRequest, ArmedSite, Entries, Image, Write};
use trapline_trace::{Function, Load, Module, Unload};

use crate::{
    Options,
    agent::Agent,
    divert::Undiverted,
    drain::{About, Drain},
    exec::{NewImage, Untraceable},
    figures,
    pending::Pending,
    pool::Pool,
    remote::{Errand, Remote},
    sandbox::Hook,
    shims::{self, Shimmed},
    space::{AgentAt, Loaded, Space, Stubs, ThreadPointer},
    sys::{
        Tid,
        maps::{self, Mapping},
        memory::Memory,
        shared::{self, SharedMemory},
    },
};

/// How many of the selected functions are traced, and why the others are not.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Coverage {
    /// Traced functions.
    pub traced: u64,
    /// Those of them whose returns are not seen.
    pub entry_only: u64,
    /// How many are not traced, by reason.
    pub untraced: BTreeMap<String, u64>,
}

impl Coverage {
    /// All selected functions.
    pub fn total(&self) -> u64 {
        self.traced + self.untraced.values().sum::<u64>()
    }
}

/// The dynamic linker's function that is called when objects come and go.
const LINKER_REPORT: &str = "_dl_debug_state";

/// How the file names of C libraries begin.
const C_LIBRARIES: [&str; 3] = ["libc.", "libc-2.", "ld-musl-"];

/// The name under which targets have the agent mapped.
const AGENT_NAME: &str = "trapline-agent";

/// Why a 32-bit program is not traced by a recorder that was built without the agent for it.
pub(crate) const NO_NARROW_AGENT: &str = "it is a 32-bit program, and this trapline was built without the agent for those; add the target by `rustup target add i686-unknown-linux-gnu` and build trapline again";

/// A file's identity: device, inode, and when it was changed.
type FileKey = (u64, u64, i64, i64);

/// A file whose functions are known.
#[derive(Debug)]
pub(crate) struct KnownModule {
    /// Its number.
    pub(crate) id: u32,
    /// Whether the trace has it. Otherwise nothing of it is traced, and it is known for its shims.
    pub(crate) is_listed: bool,
    first_site: u32,
    image: Image,
    /// Indices of the functions that are to be armed.
    selected: Vec<usize>,
    shims: Vec<Shimmed>,
    /// Where its unwinder is, before the load bias is added.
    unwinder: Option<AddrRange>,
}

/// What is known of files, whatever process maps them.
#[derive(Debug)]
pub(crate) struct Armory {
    agent: Agent,
    injected: Agent,
    /// For 32-bit processes, if the recorder was built with it.
    narrow: Option<Agent>,
    agent_file: File,
    agent_path: String,
    modules: HashMap<FileKey, Result<Arc<KnownModule>, String>>,
    hooks: HashMap<FileKey, Hook>,
    /// Files of which nothing is traced; those among them that have shims.
    others: HashMap<FileKey, Option<Arc<KnownModule>>>,
    next_module: u32,
    next_site: u32,
    coverage: Coverage,
}

impl Armory {
    /// Nothing is known yet but the agent.
    pub(crate) fn new() -> io::Result<Self> {
        let agent = Agent::native();
        let agent_file = shared::sealed_file(c"trapline-agent", agent.bytes())?;
        let agent_path = shared::path_for_others(agent_file.as_raw_fd());
        Ok(Self {
            agent,
            injected: Agent::injected(Mode::Bits64).ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?,
            narrow: Agent::injected(Mode::Bits32),
            agent_file,
            agent_path,
            modules: HashMap::new(),
            hooks: HashMap::new(),
            others: HashMap::new(),
            next_module: 0,
            next_site: 0,
            coverage: Coverage::default(),
        })
    }

    /// What the dynamic linker is asked to preload.
    pub(crate) fn agent_path(&self) -> &str {
        &self.agent_path
    }

    /// What was armed so far.
    pub(crate) fn coverage(&self) -> Coverage {
        self.coverage.clone()
    }

    /// So many edits could not be made, because somebody was in the way.
    pub(crate) fn leave_out(&mut self, count: u64) {
        if count > 0 {
            self.coverage.traced = self.coverage.traced.saturating_sub(count);
            *self.coverage.untraced.entry("in-use".to_owned()).or_default() += count;
        }
    }

    /// Arms an image whose objects are loaded, and of which nothing has run but the dynamic linker. Returns signals that came meanwhile.
    pub(crate) fn arm_image(
        &mut self,
        tid: Tid,
        process: u32,
        image: &NewImage,
        memory: Memory,
        options: &Options,
        drain: &Drain,
    ) -> Result<(Space, Vec<i32>), Untraceable> {
        let mappings = maps::read(tid)?;
        let agent = self.find_agent(&mappings, &memory)?;
        let mut remote = Remote::on_errand(tid, &memory, agent.errand)?;
        let result = self.arm_with(&mut remote, tid, process, image, (memory, agent), options, drain);
        let signals = remote.finish()?;
        Ok((result?, signals))
    }

    #[expect(clippy::too_many_arguments, reason = "one caller, which has them all")]
    fn arm_with(
        &mut self,
        remote: &mut Remote,
        tid: Tid,
        process: u32,
        image: &NewImage,
        (memory, agent): (Memory, AgentAt),
        options: &Options,
        drain: &Drain,
    ) -> Result<Space, Untraceable> {
        image.clean(remote, &memory)?;
        let pool = Pool::new(options.chunks, options.on_full).map(Arc::new)?;
        let mut space = Space::new(agent);
        space.counters = drain.counters_for(tid, Mode::Bits64)?;
        let mappings = maps::read(tid)?;
        let place = space.place_pool(&pool, &mappings)?;
        space.place_counters(&mappings)?;
        space.map_pool(remote, &memory, &pool, Some(place))?;
        let memory = Arc::new(memory);
        write_config(&memory, &agent, options)?;
        space.memory = Some(Arc::clone(&memory));
        space.pool = Some(pool);
        let mut pending = Pending::new(Mode::Bits64, memory, maps::read(tid)?, 0);
        self.prepare_modules(&mut pending, tid, process, &mut space, options, drain)?;
        match hook_linker(&mut pending, &agent, image.debug_state, image.linker_state()) {
            // Without it, unwinders that come later show the agent's frames.
            Err(_) if options.libraries.is_empty() => {}
            hooked => hooked?,
        }
        pending.commit(remote, &mut space, drain)?;
        Ok(space)
    }

    /// Arms what has come since, and forgets what has gone. The thread is stopped where it waits for us.
    pub(crate) fn arm_changes(
        &mut self,
        tid: Tid,
        process: u32,
        space: &mut Space,
        options: &Options,
        drain: &Drain,
    ) -> Result<Vec<i32>, Untraceable> {
        let Some(memory) = space.memory.clone() else { return Ok(Vec::new()) };
        let last_area = memory.read_word(space.agent.config.after(offset_of!(Config, areas)))?;
        let mut pending = Pending::new(space.agent.mode, Arc::clone(&memory), maps::read(tid)?, last_area);
        self.prepare_modules(&mut pending, tid, process, space, options, drain)?;
        let mut remote = Remote::on_errand(tid, &memory, space.agent.errand)?;
        let result = pending.commit(&mut remote, space, drain);
        let signals = remote.finish()?;
        result.map(|()| signals)
    }

    fn find_agent(&self, mappings: &[Mapping], memory: &Memory) -> Result<AgentAt, Untraceable> {
        let inode = self.agent_file.metadata()?.ino();
        let is_it = |mapping: &&Mapping| mapping.inode == inode && mapping.path.to_string_lossy().contains(AGENT_NAME);
        let Some(first) = mappings.iter().find(is_it) else {
            return Err(Untraceable("its dynamic linker did not load the agent".to_owned()));
        };
        let base = first.range.start.offset(-first.offset.cast_signed());
        let mut found = agent_at(Mode::Bits64, &self.agent, base, ThreadPointer::Own)?;
        found.thread_offset = memory.read_word(found.config.after(offset_of!(Config, thread_offset)))?.cast_signed();
        Ok(found)
    }

    /// The agent that is injected into processes of this width.
    pub(crate) fn injected_agent(&self, mode: Mode) -> Result<&Agent, Untraceable> {
        match mode {
            Mode::Bits32 => self.narrow.as_ref().ok_or_else(|| Untraceable(NO_NARROW_AGENT.to_owned())),
            Mode::Bits64 => Ok(&self.injected),
        }
    }

    /// Finds out what has come and what has gone, and prepares to arm it.
    pub(crate) fn prepare_modules(
        &mut self,
        pending: &mut Pending,
        tid: Tid,
        process: u32,
        space: &mut Space,
        options: &Options,
        drain: &Drain,
    ) -> Result<(), Untraceable> {
        let mappings = maps::read(tid)?;
        let main = fs::metadata(format!("/proc/{tid}/exe")).map(|metadata| metadata.ino())?;
        let agent = self.agent_file.metadata()?.ino();
        let mut present = Vec::new();
        for (path, inode, bias_of) in objects(&mappings) {
            if !space.is_sandbox_hooked && is_c_library(&path) {
                self.hook_sandbox(pending, tid, space, &mappings, (inode, bias_of))?;
            }
            if inode == agent {
                continue;
            }
            let Some(mapping) = mappings.iter().find(|mapping| mapping.inode == inode && mapping.is_executable) else {
                continue;
            };
            let Some(file) = mapping.file(tid) else { continue };
            let module = if inode == main || is_selected(&path, &options.libraries) {
                self.module(&file, &path, options, drain)
            } else {
                self.other(&file)
            };
            let Some(module) = module else { continue };
            let bias = bias_of.wrapping_sub(module.image.lowest_address() & !4095);
            present.push(Loaded { module, bias });
        }
        let tsc = shared::tsc();
        let is_in = |all: &[Loaded], one: &Loaded| all.iter().any(|other| other.key() == one.key());
        for gone in space.loaded.extract_if(.., |loaded| !is_in(&present, loaded)) {
            if !gone.module.is_listed {
                continue;
            }
            pending.unloaded(Unload { process, module: gone.module.id, bias: gone.bias, tsc });
        }
        for loaded in present {
            if is_in(&space.loaded, &loaded) {
                continue;
            }
            if loaded.module.is_listed {
                pending.loaded(Load { process, module: loaded.module.id, bias: loaded.bias, tsc });
            }
            match self.prepare_module(pending, space, &loaded, options) {
                // Nothing was changed, and what is traced of the process is none the worse for it.
                Err(_) if !loaded.module.is_listed => {}
                armed => armed?,
            }
            space.loaded.push(loaded);
        }
        Ok(())
    }

    /// Has the agent hear of sandboxes before they are switched on.
    fn hook_sandbox(
        &mut self,
        pending: &mut Pending,
        tid: Tid,
        space: &mut Space,
        mappings: &[Mapping],
        (inode, bias): (u64, u64),
    ) -> Result<(), Untraceable> {
        let mapping = mappings.iter().find(|mapping| mapping.inode == inode && mapping.is_executable);
        let Some(file) = mapping.and_then(|mapping| mapping.file(tid)) else { return Ok(()) };
        let key = file_key(&fs::metadata(&file)?);
        let hook = match self.hooks.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(Hook::read(&fs::read(&file)?)),
        };
        if hook.is_empty() {
            return Ok(());
        }
        space.is_sandbox_hooked = true;
        if let Err(error) = hook.arm(pending, &space.agent, bias) {
            // Everything else goes on: most programs forbid themselves nothing.
            *self.coverage.untraced.entry(format!("sandboxes are not heard of: {error}")).or_default() += 1;
        }
        Ok(())
    }

    /// The functions of a file, read once.
    fn module(&mut self, file: &Path, name: &Path, options: &Options, drain: &Drain) -> Option<Arc<KnownModule>> {
        let metadata = fs::metadata(file).ok()?;
        let key = file_key(&metadata);
        if let Some(known) = self.modules.get(&key) {
            return known.as_ref().ok().cloned();
        }
        let known = self.read_module(file, name, options, drain).map(Arc::new);
        if let Err(reason) = &known {
            *self.coverage.untraced.entry(format!("{}: {reason}", name.display())).or_default() += 1;
        }
        self.modules.entry(key).or_insert(known).as_ref().ok().cloned()
    }

    /// A file of which nothing is traced, if it has shims.
    fn other(&mut self, file: &Path) -> Option<Arc<KnownModule>> {
        let key = file_key(&fs::metadata(file).ok()?);
        if let Some(known) = self.others.get(&key) {
            return known.clone();
        }
        let image = shims::may_be_in(file).then(|| Image::open(file).ok()).flatten();
        let known = image.map(|image| (shims::find(&image), image)).filter(|(shims, _)| !shims.is_empty());
        let known = known.map(|(shims, image)| {
            let id = self.new_module();
            let unwinder = shims::unwinder(&image);
            Arc::new(KnownModule { id, is_listed: false, first_site: 0, image, selected: Vec::new(), shims, unwinder })
        });
        self.others.entry(key).or_insert(known).clone()
    }

    /// Numbers for a module whose functions have no sites, and for its first function; `None` if there are too many.
    pub(crate) fn reserve_module(&mut self, functions: usize) -> Option<(u32, u32)> {
        let first_site = self.next_site;
        self.next_site = first_site.checked_add(u32::try_from(functions).ok()?).filter(|next| *next <= MAX_SITES)?;
        Some((self.new_module(), first_site))
    }

    fn new_module(&mut self) -> u32 {
        self.next_module += 1;
        self.next_module - 1
    }

    fn read_module(
        &mut self,
        file: &Path,
        name: &Path,
        options: &Options,
        drain: &Drain,
    ) -> Result<KnownModule, String> {
        let image = Image::open(file).map_err(|error| error.to_string())?;
        let functions = image.functions();
        let count = u32::try_from(functions.len()).unwrap_or(u32::MAX);
        let first_site = self.next_site;
        let most = if drain.figures().is_some() { MAX_SITES.min(MAX_COUNTED_SITES) } else { MAX_SITES };
        let next_site = first_site.checked_add(count).filter(|next| *next <= most);
        let Some(next_site) = next_site else { return Err(format!("there are more than {most} functions")) };
        self.next_site = next_site;
        let id = self.new_module();
        let mut selected = Vec::new();
        let listed: Vec<Function> = functions
            .iter()
            .enumerate()
            .map(|(index, function)| {
                let untraced = if !options.functions.matches(&function.name, Addr::new(function.address)) {
                    Some(("not-selected".to_owned(), String::new()))
                } else if let Some((reason, detail)) = function.untraced() {
                    Some((reason.to_owned(), detail))
                } else if function.name == LINKER_REPORT {
                    Some(("in-use".to_owned(), "trapline hears of new libraries there".to_owned()))
                } else if SANDBOX_FUNCTIONS.contains(&function.name.as_str()) && is_c_library(name) {
                    Some(("in-use".to_owned(), "trapline hears of sandboxes there".to_owned()))
                } else {
                    selected.push(index);
                    None
                };
                match &untraced {
                    None => {
                        self.coverage.traced += 1;
                        self.coverage.entry_only += u64::from(!options.returns || function.is_entry_only());
                    }
                    Some((reason, _)) if reason != "not-selected" => {
                        *self.coverage.untraced.entry(reason.clone()).or_default() += 1;
                    }
                    Some(_) => {}
                }
                let (untraced, detail) =
                    untraced.map_or((None, String::new()), |(reason, detail)| (Some(reason), detail));
                Function {
                    name: function.name.clone(),
                    address: function.address,
                    size: function.size,
                    untraced,
                    detail,
                }
            })
            .collect();
        if let Some(figures) = drain.figures() {
            let functions = listed
                .iter()
                .map(|function| figures::Function { name: function.name.clone(), address: function.address });
            let path = name.to_string_lossy().into_owned();
            figures.add_module(figures::Module { path, first_site, functions: functions.collect() });
        }
        let (path, build_id) = (name.to_string_lossy().into_owned(), image.build_id().map(<[u8]>::to_vec));
        drain.write(About::Module, move |writer| {
            writer.module(&Module { id, path: &path, build_id: build_id.as_deref(), first_site, functions: &listed })
        });
        let shims = shims::find(&image);
        let unwinder = shims::unwinder(&image).filter(|_| !shims.is_empty());
        Ok(KnownModule { id, is_listed: true, first_site, image, selected, shims, unwinder })
    }

    fn prepare_module(
        &mut self,
        pending: &mut Pending,
        space: &mut Space,
        loaded: &Loaded,
        options: &Options,
    ) -> Result<(), Untraceable> {
        let module = &loaded.module;
        if module.selected.is_empty() && module.shims.is_empty() {
            return Ok(());
        }
        if let Some(stubs) = space.stubs.get_mut(&loaded.key()) {
            if !stubs.set_aside.is_empty() {
                let shared = || Untraceable("a child goes on with a patch of what was unloaded here".to_owned());
                Arc::get_mut(stubs).ok_or_else(shared)?.forget_patches();
            }
            return pending.edit(&stubs.writes);
        }
        let shims: Vec<_> = module.shims.iter().map(|shim| shim.led_through(&space.agent)).collect();
        let len_bytes = module.image.stub_bytes_bound(&module.selected, &shims).next_multiple_of(4096);
        let stubs_at = place_of_stubs(pending, loaded, len_bytes)?;
        let armed = module.image.arm(&ArmRequest {
            selected: &module.selected,
            bias: loaded.bias,
            stubs_at,
            entries: space.agent.entries,
            first_site: module.first_site,
            returns: options.returns,
            limit_depth: options.max_depth.is_some(),
            shims: &shims,
            diverted: pending.diverted(),
        });
        pending.edit(&armed.writes)?;
        let shared = Arc::new(SharedMemory::new(c"trapline-stubs", len_bytes)?);
        shared.fill(0, &armed.stubs);
        if options.start_off {
            switch_off(&shared, stubs_at, &armed.sites);
        }
        pending.map_stubs(stubs_at, &shared, len_bytes);
        for (_, reason) in &armed.refused {
            self.coverage.traced -= 1;
            *self.coverage.untraced.entry(reason.code().to_owned()).or_default() += 1;
        }
        let of_unwinders = writes_of_shims(module, loaded.bias, &armed.writes);
        let to_process =
            |range: AddrRange| AddrRange::new(range.start.offset(loaded.bias.cast_signed()), range.len_bytes());
        let unwinder = module.unwinder.map(to_process);
        let stubs = Stubs {
            mode: space.agent.mode,
            at: stubs_at,
            memory: shared,
            sites: armed.sites,
            unselected: armed.unselected,
            set_aside: armed.set_aside.into_iter().map(Undiverted::from).collect(),
            writes: armed.writes,
            of_unwinders,
            unwinder,
        };
        space.stubs.insert(loaded.key(), Arc::new(stubs));
        Ok(())
    }
}

/// The edits at the beginnings of functions that are led through the agent.
fn writes_of_shims(module: &KnownModule, bias: u64, writes: &[Write]) -> Vec<Write> {
    /// Where a function's window may begin, behind what marks it as a function.
    const BEGINNING_BYTES: u64 = 16;
    let functions = module.shims.iter().filter_map(|shim| module.image.functions().get(shim.function()));
    let starts: Vec<u64> = functions.map(|function| function.address.wrapping_add(bias)).collect();
    let is_of_shim = |write: &&Write| {
        starts.iter().any(|start| write.at.value().checked_sub(*start).is_some_and(|offset| offset < BEGINNING_BYTES))
    };
    writes.iter().filter(is_of_shim).copied().collect()
}

/// Puts a nop where each stub calls an entry. No thread runs the stubs yet.
fn switch_off(stubs: &SharedMemory, stubs_at: Addr, sites: &[ArmedSite]) {
    let nop = encode::nop(CALL_BYTES);
    for site in sites {
        let offset = usize::try_from(site.on.distance_from(stubs_at)).expect("a site's stub is one of the stubs");
        stubs.fill(offset, &nop);
    }
}

/// Finds room for a module's stubs.
fn place_of_stubs(pending: &Pending, loaded: &Loaded, len_bytes: usize) -> Result<Addr, Untraceable> {
    let image = &loaded.module.image;
    let moved = |at: Addr| at.offset(loaded.bias.cast_signed());
    let near = AddrRange { start: moved(image.text_range().start), end: moved(image.text_range().end) };
    let none = || Untraceable(format!("there is no room for {len_bytes} bytes of stubs within reach of {near:?}"));
    pending.find_hole(near, len_bytes as u64).ok_or_else(none)
}

/// Tells the agent what the recorder was asked for.
pub(crate) fn write_config(memory: &Memory, agent: &AgentAt, options: &Options) -> io::Result<()> {
    let max_depth = u64::from(options.max_depth.unwrap_or(u32::MAX));
    memory.write_word(agent.config.after(offset_of!(Config, max_depth)), max_depth)
}

/// Where an agent that is loaded at `base` has its entries. How far its threads' states are from their pointers is left to the caller.
pub(crate) fn agent_at(
    mode: Mode,
    agent: &Agent,
    base: Addr,
    thread_pointer: ThreadPointer,
) -> Result<AgentAt, Untraceable> {
    let at = |name: &str| {
        let address = agent.symbol(name);
        address
            .map(|address| base.offset(address.cast_signed()))
            .ok_or_else(|| Untraceable(format!("the agent has no {name}")))
    };
    let config = at(symbol::CONFIG)?;
    Ok(AgentAt {
        mode,
        entries: Entries {
            enter: at(symbol::ENTER)?,
            enter_keep_flags: at(symbol::ENTER_KEEP_FLAGS)?,
            enter_limited: at(symbol::ENTER_LIMITED)?,
            point: at(symbol::POINT)?,
            point_keep_flags: at(symbol::POINT_KEEP_FLAGS)?,
        },
        config,
        objects_changed: at(symbol::OBJECTS_CHANGED)?,
        sandbox: at(symbol::SANDBOX)?,
        backtrace: at(symbol::BACKTRACE)?,
        find_fde: at(symbol::FIND_FDE)?,
        syscall_insn: at(symbol::SYSCALL)?,
        errand: Errand { syscall_insn: at(symbol::ERRAND)?, registers: at(symbol::ERRAND_REGISTERS)?, config },
        thread_offset: 0,
        thread_pointer,
        return_code: at(symbol::RETURN)?,
        walking: at(symbol::WALKING)?,
        asked: AddrRange { start: at(symbol::ASKED)?, end: at(symbol::ASKED_END)? },
        shadows: at(symbol::SHADOWS)?,
    })
}

/// Has the dynamic linker tell the agent when objects come and go. `debug_state` is the function that it calls then, and does nothing;
/// `linker_state` says what it is doing.
pub(crate) fn hook_linker(
    pending: &mut Pending,
    agent: &AgentAt,
    debug_state: Addr,
    linker_state: Addr,
) -> Result<(), Untraceable> {
    let Ok(jump) = encode::jmp(debug_state, agent.objects_changed, agent.mode) else {
        return Err(Untraceable(
            "the agent is out of the dynamic linker's reach: libraries that come later are not traced".to_owned(),
        ));
    };
    let expected = pending.memory().read_vec(debug_state, jump.len())?;
    pending.tell_agent(agent.config.after(offset_of!(Config, linker_state)), linker_state.value());
    pending.edit_others(&[Write { at: debug_state, expected: InsnBytes::new(&expected), new: InsnBytes::new(&jump) }])
}

/// The files that are mapped with code: path, inode, and the address of the first byte of the file.
fn objects(mappings: &[Mapping]) -> Vec<(PathBuf, u64, u64)> {
    let mut objects: Vec<(PathBuf, u64, u64)> = Vec::new();
    for (index, mapping) in mappings.iter().enumerate() {
        if !mapping.is_executable || mapping.inode == 0 {
            continue;
        }
        // The nearest mapping of its beginning, below.
        let start = mappings[..=index].iter().rev().find(|other| other.inode == mapping.inode && other.offset == 0);
        let Some(start) = start else { continue };
        let start = start.range.start.value();
        if !objects.iter().any(|(_, _, other)| *other == start) {
            objects.push((mapping.path.clone(), mapping.inode, start));
        }
    }
    objects
}

fn is_c_library(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    C_LIBRARIES.iter().any(|beginning| name.starts_with(beginning))
}

fn file_key(metadata: &fs::Metadata) -> FileKey {
    (metadata.dev(), metadata.ino(), metadata.mtime(), metadata.mtime_nsec())
}

fn is_selected(path: &Path, globs: &[String]) -> bool {
    let full = path.to_string_lossy();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    globs.iter().any(|glob| {
        let filter = Filter::name(glob);
        [&*full, &*name].iter().any(|text| filter.matches(text, Addr::default()))
    })
}
