//! Sites that are switched while programs run, and what else was ordered while they do.
//!
//! Owns how the [tracer](crate::tracer) carries out [`Order`]s: what is switched by order is exchanged while all threads stand still for a moment, so that nobody meets a
//! breakpoint and the processes need nothing more of ours; each site is one instruction, which nobody is in the middle of. What tests switch all the time is poked by the
//! [`Toggler`](crate::toggle::Toggler). Invariant: a site holds its call, or a nop, and whoever stood still goes on.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs,
    mem::offset_of,
    os::unix::ffi::OsStrExt,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use trapline_abi::{agent::Config, counters::MAX_RECORDED};
use trapline_engine::insn::{CALL_BYTES, encode};

use super::{Tid, Tracer, ptrace, spawn, stop::Crowd};
use crate::{
    Options,
    counters::Counters,
    drain::{Message, SpaceId},
    error::Error,
    figures::Order,
    space::Stubs,
};

/// How long threads may take to stand still, each time.
const PATIENCE: [Duration; 4] =
    [Duration::from_millis(50), Duration::from_millis(200), Duration::from_millis(800), Duration::from_secs(2)];

/// A site that is switched off, and what stands there while it is on.
#[derive(Debug)]
pub(super) struct Off {
    stubs: Arc<Stubs>,
    id: u32,
    call: [u8; CALL_BYTES],
}

impl Tracer<'_> {
    /// Does what was ordered.
    pub(super) fn see_to_orders(&mut self) {
        let Some(figures) = self.drain.figures().cloned() else { return };
        while let Some(order) = figures.next_order() {
            match order {
                Order::Switch { sites, is_on } => {
                    if !self.switch(&sites, is_on) {
                        figures.tell("the threads do not stand still; nothing was switched".to_owned());
                    }
                }
                Order::Record { output, sites, given } => {
                    if let Err(error) = self.record_beside(output, sites, given) {
                        figures.tell(error.to_string());
                    }
                }
                Order::StopRecording => self.stop_recording(),
                Order::End if self.is_attached => self.heard.push(0),
                Order::End => spawn::kill(self.main, libc::SIGTERM),
            }
        }
    }

    /// Begins a trace of what these functions do.
    fn record_beside(
        &mut self,
        output: PathBuf,
        sites: Vec<u32>,
        given: BTreeMap<String, String>,
    ) -> Result<(), Error> {
        self.stop_recording();
        let command = fs::read(format!("/proc/{}/cmdline", self.main)).unwrap_or_default();
        let words = command.split(|byte| *byte == 0).filter(|word| !word.is_empty());
        let command: Vec<OsString> = words.map(|word| OsStr::from_bytes(word).to_owned()).collect();
        let options = Options { output, given, ..self.options.clone() };
        let writer = crate::writer(&crate::meta(&command, &options), &options)?;
        self.drain.tell(Message::Begin(writer, sites.clone()));
        for space in self.spaces.values() {
            if let Some(counters) = &space.counters {
                counters.select(&sites);
            }
        }
        self.recordings = self.recordings % MAX_RECORDED + 1;
        self.selection = sites;
        self.tell_agents_recorded(self.recordings);
        Ok(())
    }

    fn stop_recording(&mut self) {
        if self.selection.is_empty() {
            return;
        }
        self.selection.clear();
        self.tell_agents_recorded(0);
        self.drain.tell(Message::End);
    }

    fn tell_agents_recorded(&self, recorded: u64) {
        for space in self.spaces.values() {
            if let Some(memory) = &space.memory {
                // An error means that the process is gone.
                let _ = memory.write_word(space.agent.config.after(offset_of!(Config, recorded)), recorded);
            }
        }
    }

    /// Counts in a process, if calls are counted. The child of a fork goes on as its parent does.
    pub(super) fn count_in(&self, id: SpaceId, counters: Option<&Arc<Counters>>) {
        let Some(figures) = self.drain.figures() else { return };
        match counters {
            Some(counters) => {
                counters.select(&self.selection);
                figures.add(id, Arc::clone(counters));
            }
            None => figures.add_folded(id),
        }
    }

    /// Switches sites on or off in all processes. Returns whether it was possible.
    fn switch(&mut self, ids: &[u32], is_on: bool) -> bool {
        if self.spaces.is_empty() {
            return true;
        }
        let Some(still) = PATIENCE.iter().find_map(|patience| self.stop(Crowd::All, *patience)) else { return false };
        if is_on {
            for off in self.off.extract_if(.., |off| ids.contains(&off.id)) {
                off.write(&off.call);
            }
        } else {
            self.switch_off(ids);
        }
        self.resume_all(&still);
        true
    }

    fn switch_off(&mut self, ids: &[u32]) {
        let nop = encode::nop(CALL_BYTES);
        for stubs in self.spaces.values().flat_map(|space| space.stubs.values()) {
            for site in stubs.sites.iter().filter(|site| ids.contains(&site.id)) {
                let is_off = |off: &Off| Arc::ptr_eq(&off.stubs, stubs) && off.id == site.id;
                if self.off.iter().any(is_off) {
                    continue;
                }
                let mut off = Off { stubs: Arc::clone(stubs), id: site.id, call: [0; CALL_BYTES] };
                if let Some(at) = off.offset() {
                    off.call = std::array::from_fn(|index| stubs.memory.byte(at + index));
                    off.write(&nop);
                    self.off.push(off);
                }
            }
        }
    }

    pub(super) fn is_at_poked_site(&self, tid: Tid) -> bool {
        let space = self.tasks.get(&tid).and_then(|task| task.space).and_then(|space| self.spaces.get(&space));
        let (Some(toggler), Some(space)) = (&self.toggler, space) else { return false };
        ptrace::is_breakpoint(tid).unwrap_or(false) && toggler.rewound(tid, space)
    }

    pub(super) fn toggle(&mut self) {
        let Some(toggler) = &mut self.toggler else { return };
        let tasks: Vec<Tid> = self.tasks.keys().copied().collect();
        if let Err(error) = toggler.toggle_if_due(&self.spaces, &tasks) {
            self.note_failure(self.main, &error);
        }
    }

    /// Prepares a memory for toggling, if that is wanted; the task is stopped.
    pub(super) fn add_helper(&mut self, tid: Tid, id: SpaceId) -> Vec<i32> {
        let (Some(toggler), Some(space)) = (&mut self.toggler, self.spaces.get(&id)) else { return Vec::new() };
        let added = toggler.add(id, tid, space.agent.syscall_insn);
        added.unwrap_or_else(|error| {
            self.note_failure(tid, &error);
            Vec::new()
        })
    }
}

impl Off {
    /// Where the site is in the memory of the stubs.
    fn offset(&self) -> Option<usize> {
        let site = self.stubs.sites.iter().find(|site| site.id == self.id)?;
        usize::try_from(site.on.distance_from(self.stubs.at)).ok()
    }

    /// No thread of the processes that have these stubs runs.
    fn write(&self, bytes: &[u8]) {
        if let Some(at) = self.offset() {
            self.stubs.memory.fill(at, bytes);
        }
    }
}
