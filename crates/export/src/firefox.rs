//! The Firefox Profiler's processed profile: a marker a call, and samples for the call tree.
//!
//! Owns [`Firefox`]. Markers have every call with its times. A sample is a time in which one call ran itself; its weight is that time in nanoseconds, so that what the call tree counts
//! as samples are nanoseconds. Invariant: the profile is one JSON object that refers to itself everywhere, so all of it is held until the end.

use std::{
    collections::HashMap,
    io::{self, Write},
    time::{Duration, SystemTime},
};

use fxprof_processed_profile::{
    CategoryColor, CategoryHandle, CpuDelta, Frame, FrameFlags, FrameHandle, FrameInfo, MarkerTiming, ProcessHandle,
    Profile, ReferenceTimestamp, SamplingInterval, StackHandle, StaticSchemaMarker, StaticSchemaMarkerField,
    StringHandle, ThreadHandle, Timestamp,
};

use crate::{
    source::{Call, Enter, Output, Thread, Trace},
    target::Stream,
};

/// A call.
#[derive(Clone, Copy, Debug)]
struct CallMarker {
    name: StringHandle,
    category: CategoryHandle,
}

impl StaticSchemaMarker for CallMarker {
    const UNIQUE_MARKER_TYPE_NAME: &'static str = "trapline call";
    const CHART_LABEL: Option<&'static str> = Some("{marker.name}");
    const FIELDS: &'static [StaticSchemaMarkerField] = &[];

    fn name(&self, _: &mut Profile) -> StringHandle {
        self.name
    }

    fn category(&self, _: &mut Profile) -> CategoryHandle {
        self.category
    }

    fn string_field_value(&self, _: u32) -> StringHandle {
        self.name
    }

    fn number_field_value(&self, _: u32) -> f64 {
        0.0
    }
}

/// What is kept of the current thread.
#[derive(Default)]
struct Current {
    thread: Option<ThreadHandle>,
    frames: HashMap<u32, FrameHandle>,
    open: Vec<StackHandle>,
    since_ns: u64,
}

/// See the module's text.
pub(crate) struct Firefox {
    output: Stream,
    profile: Profile,
    processes: HashMap<u32, ProcessHandle>,
    /// The functions' names and categories.
    functions: Vec<CallMarker>,
    categories: HashMap<String, CategoryHandle>,
    current: Current,
}

impl Firefox {
    pub(crate) fn new(output: Stream) -> Self {
        let origin = ReferenceTimestamp::from_millis_since_unix_epoch(0.0);
        Self {
            output,
            profile: Profile::new("trapline", origin, SamplingInterval::from_nanos(1)),
            processes: HashMap::new(),
            functions: Vec::new(),
            categories: HashMap::new(),
            current: Current::default(),
        }
    }

    fn function(&mut self, trace: &Trace, number: u32) -> CallMarker {
        const COLORS: [CategoryColor; 8] = [
            CategoryColor::Blue,
            CategoryColor::Green,
            CategoryColor::Orange,
            CategoryColor::Purple,
            CategoryColor::Yellow,
            CategoryColor::Red,
            CategoryColor::Brown,
            CategoryColor::LightBlue,
        ];
        for known in &trace.functions[self.functions.len()..] {
            let color = COLORS[self.categories.len() % COLORS.len()];
            let profile = &mut self.profile;
            let category = self.categories.entry(known.module().to_owned());
            let category = *category.or_insert_with_key(|module| profile.add_category(module, color));
            self.functions.push(CallMarker { name: profile.intern_string(&known.name), category });
        }
        self.functions[number as usize]
    }

    /// Another call runs from now on.
    fn sample(&mut self, now_ns: u64) {
        let Current { thread, open, since_ns, .. } = &mut self.current;
        if let (Some(thread), Some(stack)) = (*thread, open.last()) {
            let mut rest_ns = now_ns - *since_ns;
            while rest_ns > 0 {
                // Weights have 31 bits.
                let weight = i32::try_from(rest_ns).unwrap_or(i32::MAX);
                let at = Timestamp::from_nanos_since_reference(now_ns - rest_ns);
                let part_ns = u64::from(weight.unsigned_abs());
                self.profile.add_sample(thread, at, Some(*stack), CpuDelta::from_nanos(part_ns), weight);
                rest_ns -= part_ns;
            }
        }
        *since_ns = now_ns;
    }

    fn marker(&mut self, trace: &Trace, function: u32, timing: MarkerTiming) {
        let marker = self.function(trace, function);
        if let Some(thread) = self.current.thread {
            self.profile.add_marker(thread, timing, marker);
        }
    }
}

impl Output for Firefox {
    fn begin(&mut self, trace: &Trace) -> io::Result<()> {
        let meta = trace.catalog.meta.clone().unwrap_or_default();
        let origin = SystemTime::UNIX_EPOCH + Duration::from_nanos(meta.started_unix_ns);
        self.profile.set_reference_timestamp(origin.into());
        self.profile.set_symbolicated(true);
        self.profile.set_os_name(&meta.kernel);
        if !meta.command.is_empty() {
            self.profile.set_product(&meta.command.join(" "));
        }
        Ok(())
    }

    fn thread(&mut self, trace: &Trace, thread: &Thread) -> io::Result<()> {
        let start = Timestamp::from_nanos_since_reference(trace.clock.since_start_ns(thread.process.started_tsc));
        let profile = &mut self.profile;
        let process = self.processes.entry(thread.process.id);
        let process = *process.or_insert_with(|| profile.add_process(thread.program(), thread.pid, start));
        let handle = profile.add_thread(process, thread.tid, start, thread.pid == thread.tid);
        profile.set_thread_name(handle, &thread.name);
        self.current = Current { thread: Some(handle), ..Current::default() };
        Ok(())
    }

    fn enter(&mut self, trace: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.sample(enter.start_ns);
        let CallMarker { name, category } = self.function(trace, enter.function);
        let Current { thread, frames, open, .. } = &mut self.current;
        let Some(thread) = *thread else { return Ok(()) };
        let frame = *frames.entry(enter.function).or_insert_with(|| {
            let category_pair = category.into();
            let frame = FrameInfo { frame: Frame::Label(name), category_pair, flags: FrameFlags::empty() };
            self.profile.intern_frame(thread, frame)
        });
        let stack = self.profile.intern_stack(thread, open.last().copied(), frame);
        open.push(stack);
        Ok(())
    }

    fn leave(&mut self, trace: &Trace, _: &Thread, call: Call) -> io::Result<()> {
        self.sample(call.end_ns);
        self.current.open.pop();
        let [start, end] = [call.start_ns, call.end_ns].map(Timestamp::from_nanos_since_reference);
        self.marker(trace, call.function, MarkerTiming::Interval(start, end));
        Ok(())
    }

    fn point(&mut self, trace: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        let at = Timestamp::from_nanos_since_reference(enter.start_ns);
        self.marker(trace, enter.function, MarkerTiming::Instant(at));
        Ok(())
    }

    fn end(mut self, _: &Trace) -> io::Result<()> {
        serde_json::to_writer(&mut self.output, &self.profile)?;
        self.output.flush()
    }
}
