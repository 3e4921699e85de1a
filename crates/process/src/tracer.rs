//! The tracer: one for a process, the owner of its sites.
//!
//! Owns [`Tracer`] and [`Builder`], the state behind them, and the order in which things are set up and taken down. Neighbours: [`discover`]
//! finds the sites, [`ops`](crate::ops) describes what is attached, the engine does it. Invariants: there is at most one tracer; a fork finds the
//! text whole (no batch is half done in the child); when the last handle is gone the original bytes are back.

use std::{
    cell::Cell,
    collections::HashMap,
    ffi::c_void,
    ptr,
    sync::{
        Arc, Mutex, Once, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use trapline_engine::{
    Addr, AddrRange, Callback, Engine, EngineError, Filter, Host, Mode, OpsFlags, OpsId, OpsSpec, SiteSpec,
    insn::{self, Clobbers, InsnBytes},
    trap::Resume,
};

use crate::{
    Error, HostError, OpsBuilder, RawCallback, TextWriter, TrapStats,
    discover::{self, FoundSite, Needs, SiteKind, Skipped},
    host::ProcessHost,
    interpose, names,
    ops::Kept,
    quiesce, sigtrap,
    sys::task::ProcessLock,
    thread,
};

/// Whether a tracer exists.
static RUNNING: AtomicBool = AtomicBool::new(false);

/// Held while text or the engine's state changes, and over every fork, so that a child inherits both whole.
static TEXT_LOCK: ProcessLock = ProcessLock::new();

/// Unregistered ops are reclaimed when this many wait: the check stops all threads for a moment.
const RECLAIM_AT: usize = 32;

thread_local! {
    /// See [`called_from`]; 0 outside of it.
    static CALLER: Cell<u64> = const { Cell::new(0) };
}

/// Calls `work` for a caller whose own frames all lie above `frames`: for what makes this library's functions another language's.
///
/// Whether the calling thread may still be inside a callback is told by the words of its stack. Below `frames` there are trapline's frames only, with what calls before
/// them have left in words that they do not use. Without this the frames count as trapline's from the library's own functions on.
pub fn called_from<R>(frames: Addr, work: impl FnOnce() -> R) -> R {
    struct Before(u64);
    impl Drop for Before {
        fn drop(&mut self) {
            CALLER.set(self.0);
        }
    }
    let _before = Before(CALLER.replace(frames.value()));
    work()
}

/// Where trapline's own frames begin, for a function that has a local at `marker`.
fn own_frames_below(marker: &u8) -> Addr {
    let caller = CALLER.try_with(Cell::get).unwrap_or(0);
    address(ptr::from_ref(marker).cast()).max(Addr::new(caller))
}

/// How a [`Tracer`] is to work. The defaults are right but for measurements and tests.
#[derive(Clone, Debug)]
pub struct Builder {
    resume: Resume,
    slot_limit: usize,
    text_writer: Option<TextWriter>,
}

impl Default for Builder {
    fn default() -> Self {
        Self { resume: Resume::Slots, slot_limit: thread::SLOTS, text_writer: None }
    }
}

impl Builder {
    /// How a call that meets a breakpoint is resumed. Default: [`Resume::Slots`].
    #[must_use]
    pub fn resume(mut self, resume: Resume) -> Self {
        self.resume = resume;
        self
    }

    /// How many of a thread's slots may be used: fewer than there are make the overflow path testable.
    #[must_use]
    pub fn slot_limit(mut self, slots: usize) -> Self {
        self.slot_limit = slots;
        self
    }

    /// By which means text is written. Default: the best that works.
    #[must_use]
    pub fn text_writer(mut self, writer: TextWriter) -> Self {
        self.text_writer = Some(writer);
        self
    }

    /// Finds the sites of all loaded objects, takes SIGTRAP over, and prepares the sites.
    ///
    /// # Errors
    /// [`Error::AlreadyRunning`]; [`Error::NoSites`]; [`Error::Resume`] where the strategy does not work at this width; what the kernel
    /// refuses. The process is as before then.
    #[inline(never)]
    pub fn build(self) -> Result<Tracer, Error> {
        self.check_width()?;
        if RUNNING.swap(true, Ordering::SeqCst) {
            return Err(Error::AlreadyRunning);
        }
        // The frames of discovery, which end below this, leave the addresses of sites behind.
        let marker = 0_u8;
        let marker = own_frames_below(&marker);
        in_own_frame(|| self.build_alone(marker)).inspect_err(|_| RUNNING.store(false, Ordering::SeqCst))
    }

    fn check_width(&self) -> Result<(), Error> {
        match (Mode::NATIVE, self.resume) {
            (Mode::Bits32, Resume::Push) => Err(Error::Resume(
                "resume strategy push does not work in a 32-bit process: the signal frame lies directly below ESP, so a push overwrites its \
                 FP_XSTATE_MAGIC2 and the kernel loses the thread's YMM and ZMM registers; use slots",
            )),
            (Mode::Bits32, Resume::R11) => {
                Err(Error::Resume("resume strategy r11 does not work in a 32-bit process: there is no r11; use slots"))
            }
            _ => Ok(()),
        }
    }

    fn build_alone(self, own_frames_below: Addr) -> Result<Tracer, Error> {
        let (sites, skipped) = find_sites()?;
        let specs: Vec<SiteSpec> = sites.iter().map(site_spec).collect();
        let probe = specs.first().map_or(Addr::default(), |spec| spec.address);
        let host = ProcessHost::new(self.text_writer, probe)?;
        hold_text_over_forks();
        sigtrap::ensure_installed()?;
        interpose::start();
        // From here on dropping `Inner` undoes everything.
        let engine = Engine::new(host, &sigtrap::TRAPS, specs).inspect_err(|_| give_signals_back())?;
        sigtrap::configure(self.resume, self.slot_limit, engine.int3_trampoline());
        let state = State { engine, kept: HashMap::new() };
        let inner = Arc::new(Inner { state: Mutex::new(state), sites, skipped });
        unblock_sigtrap()?;
        inner.locked_below(own_frames_below, |state| state.engine.settle())?;
        Ok(Tracer { inner })
    }
}

/// Threads that block SIGTRAP would be killed by the first int3 that they meet. What they set from now on is filtered by [`interpose`].
fn unblock_sigtrap() -> Result<(), HostError> {
    let blocking = quiesce::threads_blocking_sigtrap().map_err(HostError::Map)?;
    if blocking.is_empty() {
        return Ok(());
    }
    interpose::will_mend(blocking);
    let deadline = Duration::from_secs(1);
    quiesce::stop_world(|stopped| stopped.unblock(libc::SIGTRAP), deadline).map_err(HostError::from)?;
    Ok(())
}

fn give_signals_back() {
    interpose::stop();
    // A handler that cannot be given back stays: it passes on what is not ours.
    let _ = sigtrap::uninstall();
}

fn hold_text_over_forks() {
    extern "C" fn before() {
        TEXT_LOCK.hold_over_fork();
    }
    extern "C" fn after_in_parent() {
        TEXT_LOCK.release_after_fork();
    }
    extern "C" fn after_in_child() {
        // SAFETY: the thread that forked is the only one here, and forks in no handler's decision.
        unsafe { sigtrap::TRAPS.forget_handlers() };
        TEXT_LOCK.release_after_fork();
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the functions are async-signal-safe, take no arguments, and live as long as the process.
        unsafe { libc::pthread_atfork(Some(before), Some(after_in_parent), Some(after_in_child)) };
    });
}

/// The sites of all loaded objects, but for trapline's own functions: the breakpoint handler cannot trap on itself.
fn find_sites() -> Result<(Vec<FoundSite>, Vec<Skipped>), Error> {
    let objects = discover::loaded_objects()?;
    let (mut sites, mut skipped) = (Vec::new(), Vec::new());
    for object in &objects {
        let found = discover::compiled_in_sites(object)?;
        sites.extend(found.sites.into_iter().filter(|site| !is_own(&site.name)));
        skipped.extend(found.skipped);
    }
    if sites.is_empty() {
        return Err(Error::NoSites { objects: objects.len(), skipped: skipped.len() });
    }
    Ok((sites, skipped))
}

/// Both of Rust's manglings spell a crate's name out.
fn is_own(name: &str) -> bool {
    ["trapline_engine", "trapline_process"].iter().any(|own| name.contains(own))
}

fn site_spec(site: &FoundSite) -> SiteSpec {
    let original = InsnBytes::new(&site.found);
    let rest = match site.needs {
        Needs::Nothing => original,
        Needs::SplitNop | Needs::XrayNormalise | Needs::MergeNops => {
            let mut bytes = insn::encode::nop(insn::CALL_BYTES).to_vec();
            if original.len() > bytes.len() {
                bytes.extend_from_slice(&insn::encode::nop(original.len() - bytes.len()));
            }
            InsnBytes::new(&bytes)
        }
    };
    SiteSpec { address: site.address, name: names::demangle(&site.name).into_boxed_str(), original, rest }
}

/// A function that can be traced.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SiteInfo {
    /// Where it is poked: at the function's entry, behind `endbr` if it has one.
    pub address: Addr,
    /// The function's name as its source has it (C++ with its parameters, Rust with its path): what filters match.
    pub name: String,
    /// Its symbol as the linker knows it.
    pub symbol: String,
    /// How the site was compiled in.
    pub kind: SiteKind,
    /// Where the function goes on behind the site. A call of this address is a call of the function that no ops sees: what takes a function's place
    /// ([`OpsBuilder::replace`]) calls the function itself by it, with the function's own signature. It is good for as long as the function's
    /// object is loaded, with and without a tracer.
    pub body: Addr,
}

/// What a tracer has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Batches of pokes.
    pub batches: u64,
    /// Sites that were rewritten by them.
    pub pokes: u64,
    /// Rounds of core synchronisation: three for each batch.
    pub syncs: u64,
    /// What the breakpoint handler did.
    pub traps: TrapStats,
}

/// A handle to the process's tracer. When the last one, and the last [`Ops`](crate::Ops), is dropped, the original code is back.
#[derive(Clone)]
pub struct Tracer {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Tracer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracer").field("sites", &self.inner.sites.len()).finish_non_exhaustive()
    }
}

impl Tracer {
    /// A tracer with the default settings.
    ///
    /// # Errors
    /// As [`Builder::build`].
    pub fn new() -> Result<Self, Error> {
        Self::builder().build()
    }

    /// A tracer with other settings.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// The functions that can be traced, by address.
    pub fn sites(&self) -> impl Iterator<Item = SiteInfo> + '_ {
        self.inner.sites.iter().map(|site| SiteInfo {
            address: site.address,
            name: names::demangle(&site.name),
            symbol: site.name.clone(),
            kind: site.kind,
            // Behind what was compiled in, not just behind the call: that may be in the middle of an instruction when the original bytes are back.
            body: site.address.after(site.found.len()),
        })
    }

    /// The functions that were compiled for tracing but cannot be, each with the reason.
    pub fn skipped(&self) -> &[Skipped] {
        &self.inner.skipped
    }

    /// Begins to describe an ops. The name appears in errors.
    pub fn ops(&self, name: &str) -> OpsBuilder {
        OpsBuilder {
            inner: Arc::clone(&self.inner),
            name: name.to_owned(),
            filter: Filter::all(),
            flags: OpsFlags::default(),
            disabled: false,
        }
    }

    /// By which means text is written here.
    pub fn text_writer(&self) -> TextWriter {
        self.inner.locked(|state| state.engine.host().text_writer())
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        let engine = self.inner.locked(|state| state.engine.stats());
        Stats { batches: engine.batches, pokes: engine.pokes, syncs: engine.syncs, traps: sigtrap::stats() }
    }

    /// Waits until no thread can be inside an [`Ops`](crate::Ops) that was dropped before: its closure has been dropped then.
    ///
    /// # Errors
    /// [`Error::StillInside`] after `deadline`; the memory is kept.
    pub fn synchronize(&self, deadline: Duration) -> Result<(), Error> {
        let begin = Instant::now();
        loop {
            let pending = self.inner.reclaim();
            if pending == 0 {
                return Ok(());
            }
            if begin.elapsed() >= deadline {
                return Err(Error::StillInside { waited: begin.elapsed(), pending });
            }
            std::thread::yield_now();
        }
    }
}

struct State {
    engine: Engine<ProcessHost>,
    kept: HashMap<OpsId, Kept>,
}

/// What all handles share.
pub(crate) struct Inner {
    state: Mutex<State>,
    sites: Vec<FoundSite>,
    skipped: Vec<Skipped>,
}

impl Inner {
    /// Not inlined: below the address of its local there are trapline's own frames only.
    #[inline(never)]
    fn locked<R>(&self, work: impl FnOnce(&mut State) -> R) -> R {
        let marker = 0_u8;
        self.locked_below(own_frames_below(&marker), work)
    }

    /// The same for a caller that knows where its own frames begin.
    #[inline(never)]
    fn locked_below<R>(&self, own_frames_below: Addr, work: impl FnOnce(&mut State) -> R) -> R {
        // First the lock that a fork takes too: so the child never finds the mutex taken.
        let _not_during_fork = TEXT_LOCK.acquire();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.engine.host_mut().set_own_frames_below(own_frames_below);
        in_own_frame(|| work(&mut state))
    }

    pub(crate) fn with_engine(
        &self,
        work: impl FnOnce(&mut Engine<ProcessHost>) -> Result<(), EngineError<HostError>>,
    ) -> Result<(), Error> {
        Ok(self.locked(|state| work(&mut state.engine))?)
    }

    pub(crate) fn register(
        &self,
        name: String,
        filter: Filter,
        flags: OpsFlags,
        callback: RawCallback,
        data: *const c_void,
        kept: Kept,
    ) -> Result<OpsId, Error> {
        let entry = address(callback as *const ());
        let recursions = address(Arc::as_ptr(&kept.recursions).cast());
        self.locked(|state| {
            let clobbers = clobbers_of(state.engine.host_mut(), entry);
            let callback = Callback { entry, data: address(data.cast()), recursions, clobbers };
            let id = state.engine.register(OpsSpec { name: name.into_boxed_str(), filter, flags, callback })?;
            state.kept.insert(id, kept);
            Ok(id)
        })
    }

    pub(crate) fn unregister(&self, id: OpsId) {
        let retired = self.locked(|state| {
            // On failure the ops stays attached, and what it needs stays in `kept`.
            let _ = state.engine.unregister(id);
            state.engine.retired()
        });
        if retired >= RECLAIM_AT {
            self.reclaim();
        }
    }

    /// Drops what no thread can be inside any more, and returns how many ops are left.
    fn reclaim(&self) -> usize {
        let (dead, pending) = self.locked(|state| {
            let ids = state.engine.reclaim();
            let dead: Vec<Option<Kept>> = ids.iter().map(|id| state.kept.remove(id)).collect();
            (dead, state.engine.retired())
        });
        // Not under the lock: a closure may own another ops.
        drop(dead);
        pending
    }
}

fn address(pointer: *const ()) -> Addr {
    Addr::new(pointer.expose_provenance() as u64)
}

/// What the code at `entry` can write. What cannot be read is taken for the worst.
fn clobbers_of(host: &mut ProcessHost, entry: Addr) -> Clobbers {
    insn::clobbers(Mode::NATIVE, entry, &mut |at, bytes| {
        // Code may end at the end of a mapping: read as much as there is.
        (1..=bytes.len()).rev().find(|len| host.read_text(at, &mut bytes[..*len]).is_ok()).unwrap_or(0)
    })
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _not_during_fork = TEXT_LOCK.acquire();
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let marker = 0_u8;
        state.engine.host_mut().set_own_frames_below(own_frames_below(&marker));
        in_own_frame(|| take_down(state));
    }
}

/// Puts everything back as it was, as far as it can be.
fn take_down(state: &mut State) {
    if state.engine.release().is_err() {
        // Int3s or calls are left in the text: everything that they lead to must outlive this, and no other tracer can take over.
        std::mem::forget(std::mem::take(&mut state.kept));
        return;
    }
    if is_left(&mut state.engine) {
        give_signals_back();
        sigtrap::TRAPS.forget_sites(std::thread::yield_now);
        state.engine.host_mut().unmap_code();
    } else {
        // A thread may still be on its way through a trampoline. Rather leak than fault.
        std::mem::forget(std::mem::take(&mut state.kept));
    }
    RUNNING.store(false, Ordering::SeqCst);
}

/// Calls `work` with its locals in a frame of its own.
#[inline(never)]
fn in_own_frame<R>(work: impl FnOnce() -> R) -> R {
    work()
}

/// How often threads are looked at before their trampolines and the handler are left behind.
const LEAVE_ATTEMPTS: usize = 100;

/// Whether no thread is in trapline's code any more, or on its way into the handler. The original bytes are back already.
fn is_left(engine: &mut Engine<ProcessHost>) -> bool {
    // A thread that has executed an int3 but has not reached the handler yet stands behind the int3's byte. No other byte counts: behind the last
    // one is where a call returned to, and such words stay on stacks long after.
    let sites = engine.sites().sites();
    let behind_int3 = |site: &trapline_engine::Site| AddrRange::new(site.address().offset(1), 1);
    let mut ranges: Vec<AddrRange> = sites.iter().map(behind_int3).collect();
    ranges.extend(engine.code());
    ranges.sort_unstable_by_key(|range| range.start);
    (0..LEAVE_ATTEMPTS).any(|_| {
        let unused = matches!(engine.host_mut().is_unused(&ranges), Ok(true));
        if !unused {
            std::thread::yield_now();
        }
        unused
    })
}
