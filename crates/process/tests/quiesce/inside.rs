//! Who is found to be inside a range, and who is not.

use std::{
    ffi::c_void,
    ptr,
    sync::atomic::{AtomicBool, Ordering},
};

use trapline_engine::{Addr, AddrRange};
use trapline_process::quiesce::{How, RangeSet, Registers, Stopped, StoppedThread, Stopper, Tid};

use crate::{
    child::{PATIENCE, Pipe, Worker, body_frames_below, isolated, outcome, own_tid, wait_until, wait_until_in_syscall},
    park::{self, FIRST, Flags, Parking, SECOND},
};

/// Makes a stop in which the frames of the test, where the ranges in question lie around, are known to be ours.
fn stop<R: Send>(work: impl FnMut(&Stopped<'_>) -> R + Send) -> R {
    Stopper::new(PATIENCE).own_frames_below(body_frames_below()).run(work).expect("the threads stop").0
}

/// How thread `tid` is inside `range`, asked about the thread and about all of them: nobody else must be.
fn inside(tid: Tid, range: AddrRange) -> Option<How> {
    let forbidden = RangeSet::new([range]);
    let anyone = stop(|stopped| stopped.may_be_inside(&forbidden));
    assert_eq!(anyone.map(|blocker| (blocker.tid, blocker.how)), thread_inside(tid, range).map(|how| (tid, how)));
    thread_inside(tid, range)
}

/// How thread `tid` is inside `range`, whoever else is.
fn thread_inside(tid: Tid, range: AddrRange) -> Option<How> {
    let forbidden = RangeSet::new([range]);
    let blocker = stop(|stopped| {
        let thread = stopped.threads().find(|thread| thread.tid() == tid).expect("a thread of this process");
        stopped.may_thread_be_inside(thread, &forbidden)
    })?;
    assert_eq!(blocker.tid, tid);
    let code = if matches!(blocker.how, How::StackWord { .. }) { blocker.at.offset(-1) } else { blocker.at };
    assert!(range.contains(code), "{blocker:?} is not in {range:?}");
    Some(blocker.how)
}

fn registers(tid: Tid) -> Registers {
    let find =
        |stopped: &Stopped<'_>| stopped.threads().find(|thread| thread.tid() == tid).map(|thread| thread.registers());
    stop(find).expect("the thread exists").expect("it lives")
}

/// The one-byte range at `at`.
fn byte(at: Addr) -> AddrRange {
    AddrRange::new(at, 1)
}

isolated! {
    fn a_program_counter_inside_is_found() {
        let (worker, flags) = park::start(|flags| FIRST.park(flags));
        flags.wait_for_arrival();
        assert_eq!(inside(worker.tid, FIRST.park_range()), Some(How::Pc));
        assert_eq!(inside(worker.tid, SECOND.park_range()), None);
        assert_eq!(inside(worker.tid, FIRST.call_range()), None);
        flags.release();
        worker.join();
    }
}

isolated! {
    fn a_thread_counts_as_inside_only_while_it_is() {
        let (worker, first) = park::start(|first| {
            SECOND.park(first);
            // Wait in the other copy, with flags of its own.
            let second: &'static Flags = first.then();
            FIRST.park(second);
        });
        let second = first.then();
        first.wait_for_arrival();
        assert_eq!(inside(worker.tid, FIRST.park_range()), None, "not yet");
        assert_eq!(inside(worker.tid, SECOND.park_range()), Some(How::Pc));
        first.release();
        second.wait_for_arrival();
        assert_eq!(inside(worker.tid, FIRST.park_range()), Some(How::Pc));
        assert_eq!(inside(worker.tid, SECOND.park_range()), None, "not any more");
        second.release();
        worker.join();
    }
}

isolated! {
    fn a_return_address_alone_is_found() {
        let (worker, flags) = park::start(|flags| SECOND.park_called_through(&FIRST, flags));
        flags.wait_for_arrival();
        let sp = registers(worker.tid).sp();
        let Some(How::StackWord { slot }) = inside(worker.tid, FIRST.call_range()) else { panic!("not found") };
        assert!(slot >= sp, "{slot} is below {sp}");
        assert_eq!(inside(worker.tid, SECOND.call_range()), None, "the other copy");
        assert_eq!(inside(worker.tid, FIRST.park_range()), None, "the function that was not called");
        flags.release();
        worker.join();
    }
}

const STACK_BYTES: usize = 256 << 10;

extern "C" fn park_first(flags: *mut c_void) -> *mut c_void {
    // SAFETY: the test passes flags that live for ever.
    FIRST.park(unsafe { &*flags.cast() });
    ptr::null_mut()
}

isolated! {
    /// The kernel joins what lies behind a thread's stack to the stack, if it is memory of the same kind.
    fn memory_behind_a_stack_is_not_part_of_it() {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let stack = unsafe { libc::mmap(ptr::null_mut(), 2 * STACK_BYTES, protection, kind, -1, 0) };
        assert_ne!(stack, libc::MAP_FAILED);
        let behind = stack.cast::<usize>().wrapping_byte_add(STACK_BYTES + 64);
        let range = SECOND.park_range();
        // SAFETY: within the mapping, which nobody else uses.
        unsafe { behind.write(range.start.value().try_into().expect("an address of this process")) };
        let flags: &'static Flags = Box::leak(Box::default());
        let argument = ptr::from_ref(flags).cast_mut().cast();
        // SAFETY: zero is a value of these; they are initialised below.
        let (mut attributes, mut thread) = unsafe { std::mem::zeroed::<(libc::pthread_attr_t, libc::pthread_t)>() };
        // SAFETY: initialises a live local.
        assert_eq!(unsafe { libc::pthread_attr_init(&raw mut attributes) }, 0);
        // SAFETY: the first half of the mapping stays, and is nobody else's.
        assert_eq!(unsafe { libc::pthread_attr_setstack(&raw mut attributes, stack, STACK_BYTES) }, 0);
        // SAFETY: the function and its argument fit, and live for ever.
        let started = unsafe { libc::pthread_create(&raw mut thread, &raw const attributes, park_first, argument) };
        assert_eq!(started, 0);
        flags.wait_for_arrival();

        let tids = || stop(|stopped| stopped.threads().map(|thread| thread.tid()).max());
        let tid = tids().expect("the newest thread has the highest number, in a process as young as this");
        let stack = AddrRange::new(Addr::new(stack as u64), STACK_BYTES as u64);
        assert!(stack.contains(registers(tid).sp()));
        assert_eq!(inside(tid, FIRST.park_range()), Some(How::Pc));
        assert_eq!(inside(tid, range), None);

        flags.release();
        // SAFETY: the thread was started above, and nobody else joins it.
        assert_eq!(unsafe { libc::pthread_join(thread, ptr::null_mut()) }, 0);
    }
}

isolated! {
    /// A thread asleep in the kernel goes back to its system call instruction, which lies before its program counter.
    fn a_call_that_will_be_restarted_counts_from_its_instruction() {
        let pipe = Pipe::new();
        let worker = Worker::start(move || pipe.wait());
        wait_until_in_syscall(worker.tid, &[libc::SYS_read]);
        let registers = registers(worker.tid);
        let pc = registers.pc();
        assert_eq!(registers.restarted_syscall(), Some(pc.offset(-2)));
        // Other threads sleep in the same instruction: on i386 there is one for all of them, in the vDSO.
        assert_eq!(thread_inside(worker.tid, byte(pc)), Some(How::Pc));
        assert_eq!(thread_inside(worker.tid, byte(pc.offset(-2))), Some(How::Pc));
        assert_eq!(thread_inside(worker.tid, byte(pc.offset(-1))), None, "the middle of the instruction");
        assert_eq!(thread_inside(worker.tid, byte(pc.offset(-3))), None, "the one before");
        pipe.signal();
        worker.join().expect("the read was restarted");
    }
}

/// What the handler below tells the test, and waits for.
static IN_HANDLER: AtomicBool = AtomicBool::new(false);
static MAY_RETURN: AtomicBool = AtomicBool::new(false);

extern "C" fn linger(_: i32) {
    IN_HANDLER.store(true, Ordering::SeqCst);
    while !MAY_RETURN.load(Ordering::SeqCst) {
        std::hint::spin_loop();
    }
}

const ALTERNATE_STACK_BYTES: usize = 64 << 10;

/// Has `SIGUSR1` handled by [`linger`], on the alternate stack where there is one.
fn handle(siginfo: bool) {
    let handler: extern "C" fn(i32) = linger;
    // SAFETY: zero is a value of every field.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    // On i386 the kernel builds one of two frames, as SA_SIGINFO says.
    action.sa_flags = libc::SA_ONSTACK | if siginfo { libc::SA_SIGINFO } else { 0 };
    // SAFETY: the action is a live local; the handler is async-signal-safe, and ignores further arguments.
    outcome(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, ptr::null_mut()) }).expect("a handler");
}

/// Gives the calling thread an alternate stack, and returns where it is.
fn set_alternate_stack() -> AddrRange {
    let stack = Box::leak(vec![0_u8; ALTERNATE_STACK_BYTES].into_boxed_slice());
    let setting = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
    // SAFETY: the stack is leaked, so it stays; the setting is a live local.
    outcome(unsafe { libc::sigaltstack(&raw const setting, ptr::null_mut()) }).expect("an alternate stack");
    AddrRange::new(Addr::new(stack.as_ptr() as u64), ALTERNATE_STACK_BYTES as u64)
}

/// A thread that a signal took out of `body` onto an alternate stack, where it lingers in the handler while `examine` looks at it.
fn interrupted(siginfo: bool, body: fn(&'static Flags), examine: impl FnOnce(Tid, AddrRange)) {
    handle(siginfo);
    IN_HANDLER.store(false, Ordering::SeqCst);
    MAY_RETURN.store(false, Ordering::SeqCst);
    let (send, receive) = std::sync::mpsc::channel();
    let (worker, flags) = park::start(move |flags| {
        send.send(set_alternate_stack()).expect("the test waits");
        body(flags);
    });
    let alternate_stack = receive.recv().expect("the thread runs");
    flags.wait_for_arrival();
    // SAFETY: takes no pointers.
    let kill = unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), worker.tid, libc::SIGUSR1) };
    outcome(kill).expect("the thread exists");
    wait_until(|| IN_HANDLER.load(Ordering::SeqCst));

    assert!(alternate_stack.contains(registers(worker.tid).sp()), "the handler runs on the alternate stack");
    examine(worker.tid, alternate_stack);

    MAY_RETURN.store(true, Ordering::SeqCst);
    flags.release();
    worker.join();
}

isolated! {
    fn code_that_a_signal_interrupted_is_found_through_its_frame() {
        for siginfo in [true, false] {
            interrupted(siginfo, |flags| FIRST.park(flags), |tid, alternate_stack| {
                let found = inside(tid, FIRST.park_range());
                assert!(matches!(found, Some(How::SignalFrame { frame }) if alternate_stack.contains(frame)), "{found:?}");
                assert_eq!(inside(tid, SECOND.park_range()), None, "the other copy");
            });
        }
    }
}

isolated! {
    fn callers_of_the_interrupted_code_are_found_on_the_stack_that_it_left() {
        for siginfo in [true, false] {
            interrupted(siginfo, |flags| SECOND.park_called_through(&FIRST, flags), |tid, alternate_stack| {
                let found = inside(tid, FIRST.call_range());
                assert!(matches!(found, Some(How::StackWord { slot }) if !alternate_stack.contains(slot)), "{found:?}");
                assert_eq!(inside(tid, SECOND.call_range()), None, "the other copy");
            });
            // The control: in the same code, but not called through it.
            interrupted(siginfo, |flags| SECOND.park(flags), |tid, _| {
                assert_eq!(inside(tid, FIRST.call_range()), None);
            });
        }
    }
}

isolated! {
    fn the_asking_thread_is_searched_above_its_own_frames_only() {
        #[inline(never)]
        fn ask(forbidden: &RangeSet, floor: Option<Addr>) -> Option<(Tid, How)> {
            let stopper = Stopper::new(PATIENCE);
            let stopper = floor.map_or(stopper, |floor| stopper.own_frames_below(floor));
            let (blocker, _) = stopper.run(|stopped| stopped.may_be_inside(forbidden)).expect("the threads stop");
            blocker.map(|blocker| (blocker.tid, blocker.how))
        }
        let forbidden = RangeSet::new([FIRST.park_range()]);
        // At the width of a stack word, like a return address.
        let word = std::hint::black_box(usize::try_from(FIRST.park_range().start.value()).unwrap());
        let found = ask(&forbidden, None);
        let expected = |slot: Addr| slot < body_frames_below();
        assert!(matches!(found, Some((tid, How::StackWord { slot })) if tid == own_tid() && expected(slot)), "{found:?}");
        assert_eq!(ask(&forbidden, Some(body_frames_below())), None);
        std::hint::black_box(&word);
    }
}

isolated! {
    fn a_stopped_thread_can_be_moved() {
        let (worker, flags) = park::start(|flags| FIRST.park(flags));
        flags.wait_for_arrival();
        let moved = stop(|stopped| {
            let thread = stopped.threads().find(|thread| thread.tid() == worker.tid)?;
            Some(thread.set_pc(Parking::exit(&FIRST)))
        });
        assert_eq!(moved, Some(Ok(())));
        worker.join();
        assert!(flags.left_by_exit());
    }
}

isolated! {
    fn a_thread_that_will_restart_a_call_is_not_moved() {
        let pipe = Pipe::new();
        let worker = Worker::start(move || pipe.wait());
        wait_until_in_syscall(worker.tid, &[libc::SYS_read]);
        let results = stop(|stopped| {
            let elsewhere = FIRST.exit();
            let result_for = |tid| {
                let thread = stopped.threads().find(|thread| thread.tid() == tid)?;
                Some(thread.set_pc(elsewhere).map_err(|errno| errno.0))
            };
            let creator = stopped.threads().find(StoppedThread::is_creator)?;
            Some([result_for(worker.tid)?, result_for(creator.tid())?])
        });
        assert_eq!(results, Some([Err(libc::EBUSY); 2]));
        pipe.signal();
        worker.join().expect("the read was restarted");
    }
}
