//! What a tracer refuses, and what it says then.
//!
//! Each refusal leaves the process as it was: no byte written, SIGTRAP where it was, and what was refused works as soon as the reason is gone.
//! This program has no sites of its own, only those of the fixtures that it loads. Every test runs in a process of its own.

mod common;
#[path = "refusals/kernel.rs"]
mod kernel;

use std::{
    fs::OpenOptions,
    mem::{self, ManuallyDrop},
    os::unix::fs::FileExt,
};

use common::{
    child::in_child,
    fixture::{Compiled, native},
    signals::KernelAction,
};
use kernel::{Denied, Reservation};
use trapline_engine::EngineError;
use trapline_process::{
    Addr, AddrRange, Error, Filter, HostError, Mode, Ops, Resume, TextWriter, Tracer, sigtrap_is_ours,
};

type Unary = extern "C" fn(libc::c_long) -> libc::c_long;

/// The functions of a fixture that stays loaded, and the text that they had at first.
struct Functions {
    entries: [Addr; 3],
    text: Vec<u8>,
}

const NAMES: [&str; 3] = ["hooks_double", "hooks_triple", "hooks_weigh"];

impl Functions {
    /// Loads them. Their sites are single instructions, so that a tracer without ops leaves their text alone.
    fn load() -> Self {
        let library = ManuallyDrop::new(Compiled::Fentry.load("hooks_functions.c"));
        let mut functions = Self { entries: NAMES.map(|name| library.symbol(name)), text: Vec::new() };
        functions.text = functions.text_now();
        functions
    }

    fn text_now(&self) -> Vec<u8> {
        let entry = |entry: &Addr| {
            let at = std::ptr::with_exposed_provenance::<[u8; 16]>(native(*entry));
            // SAFETY: code of a library that is loaded, followed by more.
            unsafe { at.read_unaligned() }
        };
        self.entries.iter().flat_map(entry).collect()
    }

    fn assert_untouched(&self) {
        assert_eq!(self.text_now(), self.text);
    }

    /// Its sites lie behind `endbr`.
    fn site(&self, name: &str) -> Addr {
        let index = NAMES.iter().position(|known| *known == name).expect("one of them");
        self.entries[index].offset(4)
    }

    fn double(&self) -> libc::c_long {
        let double = std::ptr::with_exposed_provenance::<()>(native(self.entries[0]));
        // SAFETY: the fixture declares it so, and the library is loaded.
        let double = unsafe { mem::transmute::<*const (), Unary>(double) };
        double(21)
    }
}

fn register(tracer: &Tracer, filter: Filter) -> Result<Ops, Error> {
    tracer.ops("refused").filter(filter).register(|_call| ())
}

/// Registers an ops on everything, which must work.
fn assert_works(tracer: &Tracer, functions: &Functions) {
    let ops = register(tracer, Filter::name("hooks_*")).expect("nothing is in the way");
    assert_ne!(functions.text_now(), functions.text);
    assert_eq!(functions.double(), 42);
    drop(ops);
    functions.assert_untouched();
}

#[test]
fn a_process_without_sites_is_told_how_to_get_some() {
    in_child("a_process_without_sites_is_told_how_to_get_some", || {
        let before = KernelAction::of(libc::SIGTRAP);
        let error = Tracer::new().expect_err("there are no sites");
        assert!(matches!(error, Error::NoSites { objects: 2.., skipped: 0 }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("-fpatchable-function-entry=5") && text.contains("traceable!"), "{text}");
        assert_eq!(KernelAction::of(libc::SIGTRAP), before);
        let functions = Functions::load();
        assert_works(&Tracer::new().expect("there are some now"), &functions);
    });
}

#[test]
fn there_is_one_tracer_at_a_time() {
    in_child("there_is_one_tracer_at_a_time", || {
        let functions = Functions::load();
        let tracer = Tracer::new().expect("the first");
        let second = tracer.clone();
        assert!(matches!(Tracer::new(), Err(Error::AlreadyRunning)));
        drop(tracer);
        assert!(matches!(Tracer::new(), Err(Error::AlreadyRunning)));
        assert_works(&second, &functions);
        drop(second);
        assert_works(&Tracer::new().expect("the first one is gone"), &functions);
    });
}

#[test]
fn strategies_that_this_width_has_not_are_refused() {
    in_child("strategies_that_this_width_has_not_are_refused", || {
        let functions = Functions::load();
        for resume in [Resume::Push, Resume::R11] {
            match Tracer::builder().resume(resume).build() {
                Ok(tracer) => {
                    assert_eq!(Mode::NATIVE, Mode::Bits64);
                    assert_works(&tracer, &functions);
                }
                Err(Error::Resume(reason)) => {
                    assert_eq!(Mode::NATIVE, Mode::Bits32);
                    assert!(reason.contains("32-bit") && reason.contains("use slots"), "{reason}");
                    assert!(!sigtrap_is_ours());
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert_works(&Tracer::new().expect("slots work everywhere"), &functions);
    });
}

#[test]
fn names_that_match_nothing_are_answered_with_near_misses() {
    in_child("names_that_match_nothing_are_answered_with_near_misses", || {
        let functions = Functions::load();
        let tracer = Tracer::new().expect("a tracer");
        for (wrong, near) in
            [("hooks_duoble", "hooks_double"), ("hooks_tripel", "hooks_triple"), ("hooks_weight", "hooks_weigh")]
        {
            let error = register(&tracer, Filter::name(wrong)).expect_err("no function has that name");
            assert!(matches!(&error, Error::Engine(EngineError::NothingMatches { sites: 3, .. })), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(wrong) && text.contains("did you mean") && text.contains(near), "{text}");
        }
        let text = register(&tracer, Filter::name("utterly_different")).expect_err("nothing").to_string();
        assert!(!text.contains("did you mean"), "{text}");
        // A filter that is changed to one that selects nothing stays what it was.
        let ops = register(&tracer, Filter::name("hooks_double")).expect("it is there");
        ops.set_filter(Filter::name("hooks_duoble")).expect_err("no function has that name");
        assert_ne!(functions.text_now(), functions.text);
        drop(ops);
        functions.assert_untouched();
    });
}

#[test]
fn an_address_that_is_no_site_is_answered_with_the_nearest() {
    in_child("an_address_that_is_no_site_is_answered_with_the_nearest", || {
        let functions = Functions::load();
        let tracer = Tracer::new().expect("a tracer");
        let site = functions.site("hooks_triple");
        for wrong in [site.offset(1), site.offset(-1)] {
            let error = register(&tracer, Filter::address(wrong)).expect_err("no site is there");
            assert!(matches!(error, Error::Engine(EngineError::NoSuchSite { .. })), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(&wrong.to_string()) && text.contains(&site.to_string()), "{text}");
            assert!(text.contains("hooks_triple"), "{text}");
            functions.assert_untouched();
        }
        drop(register(&tracer, Filter::address(site)).expect("a site is there"));
        let nowhere = AddrRange::new(Addr::new(0x10), 0x100);
        let error = register(&tracer, Filter::range(nowhere)).expect_err("no site is there");
        assert!(matches!(error, Error::Engine(EngineError::NothingMatches { sites: 3, .. })), "{error:?}");
    });
}

fn write_text(at: Addr, bytes: &[u8]) {
    let memory = OpenOptions::new().write(true).open("/proc/self/mem").expect("procfs");
    memory.write_all_at(bytes, at.value()).expect("writing text as debuggers do");
}

#[test]
fn text_that_somebody_else_has_changed_is_named_and_nothing_is_written() {
    in_child("text_that_somebody_else_has_changed_is_named_and_nothing_is_written", || {
        let mut functions = Functions::load();
        let tracer = Tracer::new().expect("a tracer");
        let site = functions.site("hooks_triple");
        write_text(site, &[0xcc]);
        functions.text = functions.text_now();

        // Of three sites, one cannot be: none is changed.
        let error = register(&tracer, Filter::name("hooks_*")).expect_err("a debugger is there");
        let Error::Engine(EngineError::Text(mismatch)) = &error else { panic!("{error:?}") };
        assert_eq!(mismatch.at, site);
        assert_eq!(mismatch.expected[..], [0x0f, 0x1f, 0x44, 0x00, 0x00]);
        assert_eq!(mismatch.found[..], [0xcc, 0x1f, 0x44, 0x00, 0x00]);
        let text = error.to_string();
        for part in [&site.to_string(), "0f 1f 44 00 00", "cc 1f 44 00 00", "nothing was written"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        functions.assert_untouched();
        assert_eq!(functions.double(), 42);
        let stats = tracer.stats();
        assert_eq!((stats.batches, stats.pokes, stats.syncs), (0, 0, 0));

        // The others can be had, and all of them when it is gone.
        let other = register(&tracer, Filter::name("hooks_double")).expect("nobody is there");
        write_text(site, &[0x0f]);
        drop(other);
        functions.text = functions.text_now();
        assert_works(&tracer, &functions);
    });
}

#[test]
fn an_ops_whose_site_was_changed_stays_attached_and_can_be_detached_later() {
    in_child("an_ops_whose_site_was_changed_stays_attached_and_can_be_detached_later", || {
        let functions = Functions::load();
        let tracer = Tracer::new().expect("a tracer");
        let ops = register(&tracer, Filter::name("hooks_*")).expect("nothing is in the way");
        let site = functions.site("hooks_double");
        write_text(site, &[0xcc]);
        let error = ops.disable().expect_err("a debugger is there");
        assert!(matches!(error, Error::Engine(EngineError::Text(_))), "{error:?}");
        write_text(site, &[0xe8]);
        assert_eq!(functions.double(), 42);
        ops.disable().expect("nobody is there");
        functions.assert_untouched();
    });
}

#[test]
fn a_kernel_without_core_synchronisation_is_refused() {
    in_child("a_kernel_without_core_synchronisation_is_refused", || {
        let functions = Functions::load();
        let before = KernelAction::of(libc::SIGTRAP);
        for errno in [libc::EINVAL, libc::ENOSYS, libc::EPERM] {
            kernel::denying(Denied::Membarrier { errno }, || {
                let error = Tracer::new().expect_err("it cannot synchronise");
                let Error::Host(HostError::NoSyncCore { source }) = &error else { panic!("{error:?}") };
                assert_eq!(source.raw_os_error(), Some(errno));
                let text = error.to_string();
                assert!(text.contains("membarrier") && text.contains("Linux 4.16"), "{text}");
                assert_eq!(KernelAction::of(libc::SIGTRAP), before);
                functions.assert_untouched();
            });
        }
        assert_works(&Tracer::new().expect("this thread may"), &functions);
    });
}

#[test]
fn text_is_written_by_remapping_where_proc_mem_cannot_be() {
    in_child("text_is_written_by_remapping_where_proc_mem_cannot_be", || {
        let functions = Functions::load();
        kernel::denying(Denied::OpenForWriting, || {
            let tracer = Tracer::new().expect("there is another way");
            assert_eq!(tracer.text_writer(), TextWriter::Remap);
            assert_works(&tracer, &functions);
        });
        let tracer = Tracer::new().expect("this thread may");
        assert_eq!(tracer.text_writer(), TextWriter::ProcMem);
        assert_works(&tracer, &functions);
    });
}

#[test]
fn a_writer_that_is_forbidden_later_does_not_get_the_tracer_stuck() {
    in_child("a_writer_that_is_forbidden_later_does_not_get_the_tracer_stuck", || {
        let functions = Functions::load();
        let tracer = Tracer::new().expect("a tracer");
        assert_eq!(tracer.text_writer(), TextWriter::ProcMem);
        let ops = register(&tracer, Filter::name("hooks_*")).expect("nothing is in the way");
        kernel::denying(Denied::OpenForWriting, || {
            ops.disable().expect("there is another way");
            functions.assert_untouched();
            ops.enable().expect("there is another way");
        });
        drop(ops);
        assert_works(&tracer, &functions);
    });
}

#[test]
fn without_descriptors_nothing_is_written_and_it_works_when_there_are_some() {
    in_child("without_descriptors_nothing_is_written_and_it_works_when_there_are_some", || {
        let functions = Functions::load();
        let tracer = Tracer::new().expect("a tracer");
        let limited = kernel::NoDescriptors::begin();
        let error = register(&tracer, Filter::name("hooks_*")).expect_err("no file can be opened");
        assert!(matches!(error, Error::Engine(EngineError::Host(HostError::ReadText { .. }))), "{error:?}");
        functions.assert_untouched();
        drop(limited);
        assert_works(&tracer, &functions);
    });
}

#[test]
fn exhausted_memory_within_reach_is_an_error_and_nothing_is_written() {
    in_child("exhausted_memory_within_reach_is_an_error_and_nothing_is_written", || {
        if Mode::NATIVE == Mode::Bits32 {
            eprintln!("skipped: at 32 bit everything is within reach of everything");
            return;
        }
        let functions = Functions::load();
        let near = functions.site("hooks_double");

        // No room for the first trampoline.
        let reserved = Reservation::around(near);
        let error = Tracer::new().expect_err("there is no room");
        assert!(matches!(error, Error::Engine(EngineError::Host(HostError::NoMemoryWithinReach { .. }))), "{error:?}");
        assert!(error.to_string().contains("within 2 GiB of 0x"), "{error}");
        assert!(!sigtrap_is_ours());
        functions.assert_untouched();
        drop(reserved);

        // No room for one more, when what was mapped for the first is full.
        let tracer = Tracer::new().expect("there is room");
        let reserved = Reservation::around(near);
        let mut attached = Vec::new();
        let error = loop {
            match tracer.ops("one more").filter(Filter::name("hooks_*")).disabled().register(|_call| ()) {
                Ok(ops) => match ops.enable() {
                    Ok(()) => {
                        ops.disable().expect("no room is needed");
                        attached.push(ops);
                    }
                    Err(error) => break error,
                },
                Err(error) => panic!("{error}"),
            }
            assert!(attached.len() < 100_000);
        };
        assert!(matches!(error, Error::Engine(EngineError::Host(HostError::NoMemoryWithinReach { .. }))), "{error:?}");
        functions.assert_untouched();
        // Those that have a trampoline work, and new ones when there is room again.
        let ops = attached.pop().expect("there was room for some");
        ops.enable().expect("its trampoline is there");
        assert_eq!(functions.double(), 42);
        ops.disable().expect("no room is needed");
        drop(reserved);
        assert_works(&tracer, &functions);
    });
}
