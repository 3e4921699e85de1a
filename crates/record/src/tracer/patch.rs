//! Live patches that come and go while their processes are recorded.
//!
//! Owns how the [tracer](crate::tracer) carries out what commands have [asked for](crate::live::serve): [`Recorded`] is the [`Tracing`] of a process that it traces anyway. Threads
//! are stopped as for everything else; between the stops the tracer sees to what happens, as ever. Invariant: what is known of a process (its
//! [`Space`](crate::space::Space), and the guard) is what it will have to go back to when it is left, at every moment in which its threads run.

use std::{
    io,
    os::fd::AsRawFd,
    sync::Arc,
    time::{Duration, Instant},
};

use trapline_engine::Addr;
use trapline_process::quiesce::RangeSet;
use trapline_trace::{Function, Load, Module, Unload};

use super::{
    Patching, Tracer,
    stop::{Crowd, Parked, Still},
};
use crate::{
    divert::Amended,
    drain::{About, SpaceId},
    inject::Gadgets,
    leave::{requeue, worker},
    live::{
        self, Active, Done, LiveError, Process,
        serve::{Client, Job, What},
        tracing::{Errand, Hooks, Standstill, Tracing, Work},
    },
    remote::Remote,
    space::SharedMapping,
    sys::{Tid, maps, memory::Memory, shared},
    text::Hidden,
};

/// How long threads have to stand still, as for a command that comes by itself.
const PATIENCE: Duration = Duration::from_millis(15);

/// How long a single thread has to.
const PATIENCE_FOR_ONE: Duration = Duration::from_millis(500);

const PAGE_BYTES: u64 = 4096;

/// What memory for stubs is called.
const STUBS: &std::ffi::CStr = c"trapline-stubs";

impl Tracer<'_> {
    /// Does what commands want.
    pub(super) fn see_to_patches(&mut self) {
        while self.patching == Patching::Welcome {
            let Some(Job { pid, what }) = self.jobs.as_ref().and_then(|jobs| jobs.try_recv().ok()) else { return };
            let place = self.place_of(pid);
            match what {
                // An error means that the command has gone.
                What::Look(answer) => drop(answer.send(place.map(|place| self.hidden_of(place)))),
                What::Come(coming, client) => {
                    let is_to_stay = !coming.is_dry_run();
                    let done = self.carry_out_patch(pid, place, &client, |recorded| coming.carry_out(recorded));
                    if let (Ok(done), Some(place), true) = (&done, place, is_to_stay) {
                        self.note_come(pid, place, &done.patch);
                    }
                    client.tell(done);
                }
                What::Go(going, client) => {
                    let done = self.carry_out_patch(pid, place, &client, |recorded| going.carry_out(recorded));
                    if let (Ok(done), Some(place)) = (&done, place) {
                        self.note_gone(place.process, done.patch.at, shared::tsc());
                    }
                    client.tell(done);
                }
            }
        }
    }

    /// Where a process is among what is traced. Nowhere while it is being armed or left, or loads a program.
    fn place_of(&self, pid: Tid) -> Option<Place> {
        if self.patching == Patching::NotYet || self.is_leaving {
            return None;
        }
        let is_its = |tid: &Tid| super::thread_group(*tid) == Some(pid);
        let first = self.tasks.get_key_value(&pid);
        let (_, task) = first.or_else(|| self.tasks.iter().find(|(tid, _)| is_its(tid)))?;
        let is_ready = task.loading.is_none() && task.space.is_none_or(|id| self.is_ready(id));
        is_ready.then_some(Place { process: task.process, space: task.space })
    }

    fn is_ready(&self, id: SpaceId) -> bool {
        self.spaces.get(&id).is_some_and(|space| space.memory.is_some())
    }

    fn hidden_of(&self, place: Place) -> Hidden {
        let space = place.space.and_then(|id| self.spaces.get(&id));
        space.map(crate::space::Space::hidden).unwrap_or_default()
    }

    fn carry_out_patch(
        &mut self,
        pid: Tid,
        place: Option<Place>,
        client: &Client,
        carry_out: impl FnOnce(&mut dyn Tracing) -> Result<Done, LiveError>,
    ) -> Result<Done, LiveError> {
        let place = place.filter(|_| client.waits()).ok_or(LiveError::RecorderLeaves { pid })?;
        self.patching = Patching::UnderWay;
        let done = carry_out(&mut Recorded { tracer: self, pid, place, client });
        self.patching = Patching::Welcome;
        done
    }

    /// Whether nobody wants the recording to end.
    fn goes_on(&mut self) -> bool {
        if !self.is_attached {
            self.pass_on();
        }
        self.heard.is_empty() && self.end.is_none_or(|end| Instant::now() < end)
    }

    /// Tells the trace of a patch that has come: as of a file that was mapped, whose functions are its own. What it replaced is there no more.
    fn note_come(&mut self, pid: Tid, place: Place, patch: &Active) {
        let (tsc, mappings) = (shared::tsc(), maps::read(pid).unwrap_or_default());
        let is_gone = |at: u64| at == patch.at || !mappings.iter().any(|mapping| mapping.range.start.value() == at);
        let known = self.patches.keys().filter(|(process, at)| *process == place.process && is_gone(*at));
        for (process, at) in known.copied().collect::<Vec<_>>() {
            self.note_gone(process, at, tsc);
        }
        self.note_patch(place.process, patch, tsc);
    }

    /// The same, of those that were there before the recorder.
    pub(super) fn note_patches(&mut self, pid: Tid, process: u32) {
        let (memory, mappings) = (Memory::open(pid), maps::read(pid));
        // A process that cannot be read is about to end.
        let (Ok(memory), Ok(mappings), Some(place)) = (memory, mappings, self.place_of(pid)) else { return };
        let tsc = shared::tsc();
        for patch in live::in_effect(&memory, &mappings, &self.hidden_of(place)) {
            self.note_patch(process, &patch, tsc);
        }
    }

    fn note_patch(&mut self, process: u32, patch: &Active, tsc: u64) {
        let Some((id, first_site)) = self.armory.reserve_module(patch.bodies.len()) else { return };
        let detail = format!("recorded as what it replaces, in {}", patch.target);
        let functions: Vec<Function> = patch
            .bodies
            .iter()
            .map(|body| Function {
                name: body.name.clone(),
                address: body.at - patch.code.0,
                size: body.len_bytes,
                untraced: Some("patch".to_owned()),
                detail: detail.clone(),
            })
            .collect();
        let name = format!("{}.tlp", patch.name);
        self.drain.write(About::Module, move |writer| {
            writer.module(&Module { id, path: &name, build_id: None, first_site, functions: &functions })
        });
        let load = Load { process, module: id, bias: patch.code.0, tsc };
        self.drain.load(load);
        self.patches.insert((process, patch.at), load);
    }

    fn note_gone(&mut self, process: u32, at: u64, tsc: u64) {
        if let Some(Load { process, module, bias, .. }) = self.patches.remove(&(process, at)) {
            self.drain.unload(Unload { process, module, bias, tsc });
        }
    }

    /// The child of a fork has the patches of its parent.
    pub(super) fn inherit_patches(&mut self, parent: u32, child: u32) {
        let tsc = shared::tsc();
        let known = self.patches.iter().filter(|((process, _), _)| *process == parent);
        for (at, load) in known.map(|((_, at), load)| (*at, *load)).collect::<Vec<_>>() {
            let load = Load { process: child, tsc, ..load };
            self.drain.load(load);
            self.patches.insert((child, at), load);
        }
    }
}

/// What a process is among what is traced.
#[derive(Clone, Copy, Debug)]
struct Place {
    process: u32,
    /// Its memory, if it is armed.
    space: Option<SpaceId>,
}

impl Place {
    fn crowd(self) -> Crowd {
        self.space.map_or(Crowd::Process(self.process), Crowd::Space)
    }
}

/// A process that we trace.
struct Recorded<'t, 'a> {
    tracer: &'t mut Tracer<'a>,
    pid: Tid,
    place: Place,
    client: &'t Client,
}

impl Recorded<'_, '_> {
    fn space(&self) -> Option<&crate::space::Space> {
        self.tracer.spaces.get(&self.place.space?)
    }
}

impl Tracing for Recorded<'_, '_> {
    fn stop(&mut self, work: &mut Work<'_>) -> (io::Result<()>, Duration) {
        let since = Instant::now();
        let Some(still) = self.tracer.stop(self.place.crowd(), PATIENCE) else {
            let crowd = self.place.crowd();
            let is_gone = !self.tracer.tasks.iter().any(|(tid, task)| crowd.has(*tid, task));
            let error =
                if is_gone { io::Error::from_raw_os_error(libc::ESRCH) } else { io::ErrorKind::TimedOut.into() };
            return (Err(error), since.elapsed());
        };
        let mut held = Held { tracer: self.tracer, pid: self.pid, space: self.place.space, still };
        work(&mut held, since.elapsed());
        let Held { still, .. } = held;
        self.tracer.resume_all(&still);
        (Ok(()), since.elapsed())
    }

    fn borrow(&mut self, process: &Process, work: &mut Errand<'_>) -> io::Result<()> {
        let gadgets = process.gadgets(&[])?;
        let crowd = self.place.crowd();
        let mut tids: Vec<Tid> =
            self.tracer.tasks.iter().filter(|(tid, task)| crowd.has(**tid, task)).map(|(tid, _)| *tid).collect();
        // Those first that sleep in a system call.
        tids.sort_by_cached_key(|tid| !super::status_field(*tid, "State:").is_some_and(|state| state.starts_with('S')));
        for tid in tids {
            let Some(still) = self.tracer.stop(Crowd::Thread(tid), PATIENCE_FOR_ONE) else { continue };
            let done = work_in(tid, &process.memory, gadgets, work);
            self.tracer.resume_all(&still);
            return done;
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    fn pause(&mut self, pause: Duration) -> bool {
        // An error is told by the next stop.
        let _ = self.tracer.attend(Instant::now() + pause);
        self.tracer.goes_on() && self.client.waits()
    }

    fn hooks(&self, ranges: &RangeSet) -> io::Result<Option<Hooks>> {
        let Some(space) = self.space() else { return Ok(None) };
        let Some(memory) = &space.memory else { return Ok(None) };
        let stubs = space.loaded.iter().filter_map(|loaded| space.stubs.get(&loaded.key()));
        let sites = stubs.flat_map(|stubs| stubs.all_sites()).filter(|site| ranges.contains(site.window_at));
        let mappings = maps::read(self.pid)?;
        Hooks::new(space.agent, memory, &mappings, sites).map(Some)
    }
}

/// Has a stopped thread work. Signals that come meanwhile wait.
fn work_in(tid: Tid, memory: &Memory, gadgets: Gadgets, work: &mut Errand<'_>) -> io::Result<()> {
    let mut remote = Remote::by_gadgets(tid, memory, gadgets)?;
    let done = work(&mut remote);
    requeue(tid, &remote.finish()?);
    done
}

/// Its threads, which stand still.
struct Held<'t, 'a> {
    tracer: &'t mut Tracer<'a>,
    pid: Tid,
    space: Option<SpaceId>,
    still: Still,
}

impl Held<'_, '_> {
    /// Gives the process stubs of its own, if it shares those of the function at `at` with a child or its parent: the same bytes at the same place.
    fn part_with_others(&mut self, memory: &Memory, at: Addr) -> io::Result<()> {
        let Some(space) = self.space.and_then(|id| self.tracer.spaces.get(&id)) else { return Ok(()) };
        let Some((key, stubs)) = space.stubs_for(at).and_then(|key| Some((key, Arc::clone(space.stubs.get(&key)?))))
        else {
            return Ok(());
        };
        // Ours, and this one.
        if Arc::strong_count(&stubs) <= 2 {
            return Ok(());
        }
        let mappings = maps::read(self.pid)?;
        let gadgets = Gadgets::find(stubs.mode, memory, &mappings, &[]);
        let gadgets = gadgets.ok_or_else(|| io::Error::other("it has no code that makes system calls"))?;
        let own = Arc::new(stubs.copied(STUBS)?);
        self.errand(memory, gadgets, &mut |remote| {
            let mapping = SharedMapping {
                descriptor: own.memory.file().as_raw_fd(),
                at: own.at,
                len_bytes: (own.memory.len_bytes() as u64).next_multiple_of(PAGE_BYTES),
                protection: libc::PROT_READ | libc::PROT_EXEC,
                flags: libc::MAP_FIXED,
            };
            mapping.make(remote, memory).map(drop)
        })?;
        if let Some(space) = self.space.and_then(|id| self.tracer.spaces.get_mut(&id)) {
            space.stubs.insert(key, own);
        }
        Ok(())
    }
}

impl Standstill for Held<'_, '_> {
    fn threads(&self) -> Vec<Tid> {
        self.still.threads()
    }

    fn let_on(&mut self, tids: &[Tid], moment: Duration, until: Instant) -> io::Result<Option<Tid>> {
        let is_with_its_group = |tid: &&Tid| self.still.parked.get(tid) == Some(&Parked::Stopped);
        if let Some(tid) = tids.iter().find(is_with_its_group) {
            return Ok(Some(*tid));
        }
        if self.tracer.nudge(&mut self.still, tids, moment, until) {
            return Ok(None);
        }
        let is_missing = |tid: &&Tid| !self.still.parked.contains_key(tid) && self.tracer.tasks.contains_key(tid);
        Ok(tids.iter().find(is_missing).copied())
    }

    fn is_complete(&self) -> bool {
        self.tracer.is_settled(&self.still)
    }

    fn read_code(&self, memory: &Memory, at: Addr, len_bytes: usize) -> io::Result<Vec<u8>> {
        match self.space.and_then(|id| self.tracer.spaces.get(&id)) {
            Some(space) => space.read_code(memory, at, len_bytes),
            None => memory.read_vec(at, len_bytes),
        }
    }

    fn write_code(&mut self, memory: &Memory, at: Addr, bytes: &[u8]) -> io::Result<()> {
        self.part_with_others(memory, at)?;
        let Some((id, space)) = self.space.and_then(|id| Some((id, self.tracer.spaces.get_mut(&id)?))) else {
            return memory.write(at, bytes);
        };
        let amended = space.write_code(memory, at, bytes)?;
        if let (Some(guard), true) = (&self.tracer.guard, amended != Amended::default()) {
            guard.amend(id, &amended);
        }
        Ok(())
    }

    fn errand(&mut self, memory: &Memory, gadgets: Gadgets, work: &mut Errand<'_>) -> io::Result<()> {
        work_in(worker(&self.still.threads()), memory, gadgets, work)
    }
}
