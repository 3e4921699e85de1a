//! The order in which the model's poker does things is the engine's.
//!
//! The model drives the real protocol, but the steps around it (trampolines first, memory freed last) are written down a second time there. Here the
//! real engine runs on a host that keeps a record.

use trapline_engine::{
    Addr, AddrRange, Callback, Engine, Filter, Host, Mode, OpsFlags, OpsSpec, SiteSpec,
    insn::{Clobbers, INT3, encode},
    poke::TextWrite,
    trampoline::{Machine, Segment, ThreadBase, VectorSave},
    trap::{Decision, TrapState},
};

const SITE: Addr = Addr::new(0x40_1000);
const CODE: Addr = Addr::new(0x40_8000);
const NOP_BYTES: usize = 5;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Event {
    WriteTrampoline,
    /// Of the site; whether the batch was live.
    ReadText(bool),
    WriteInt3(bool),
    WriteTail(bool),
    WriteHead(bool),
    Barrier(bool),
    AskWhetherUnused,
    FreeTrampoline,
}

struct Recorder {
    trap: &'static TrapState,
    text: [u8; NOP_BYTES],
    code_bytes: i64,
    unused: bool,
    events: Vec<Event>,
}

impl Recorder {
    fn batch_is_live(&self) -> bool {
        matches!(self.trap.decide(SITE.offset(1), |_| INT3, |_| ()), Decision::Emulate(()))
    }
}

impl Host for Recorder {
    type Error = std::convert::Infallible;

    fn machine(&self) -> Machine {
        let thread = ThreadBase { segment: Segment::Fs, pointer: None, offset: -0x200 };
        Machine { mode: Mode::Bits64, thread, vectors: VectorSave::Never }
    }

    fn read_text(&mut self, at: Addr, bytes: &mut [u8]) -> Result<(), Self::Error> {
        assert_eq!(at, SITE);
        bytes.copy_from_slice(&self.text);
        self.events.push(Event::ReadText(self.batch_is_live()));
        Ok(())
    }

    fn write_text(&mut self, writes: impl Iterator<Item = TextWrite>) -> Result<(), Self::Error> {
        let live = self.batch_is_live();
        for TextWrite { at, bytes } in writes {
            let start = usize::try_from(at.distance_from(SITE)).expect("only the site is written");
            self.text[start..start + bytes.len()].copy_from_slice(&bytes);
            self.events.push(match (start, *bytes == [INT3]) {
                (0, true) => Event::WriteInt3(live),
                (0, false) => Event::WriteHead(live),
                _ => Event::WriteTail(live),
            });
        }
        Ok(())
    }

    fn sync_cores(&mut self) -> Result<(), Self::Error> {
        self.events.push(Event::Barrier(self.batch_is_live()));
        Ok(())
    }

    fn alloc_code(&mut self, _: AddrRange, len_bytes: usize) -> Result<Addr, Self::Error> {
        let at = CODE.offset(self.code_bytes);
        self.code_bytes += i64::try_from(len_bytes.next_multiple_of(16)).expect("trampolines are small");
        Ok(at)
    }

    fn write_code(&mut self, _: Addr, _: &[u8]) -> Result<(), Self::Error> {
        self.events.push(Event::WriteTrampoline);
        Ok(())
    }

    fn free_code(&mut self, _: AddrRange) {
        self.events.push(Event::FreeTrampoline);
    }

    fn is_unused(&mut self, _: &[AddrRange]) -> Result<bool, Self::Error> {
        self.events.push(Event::AskWhetherUnused);
        Ok(self.unused)
    }

    fn relax(&mut self) {}
}

fn engine() -> Engine<Recorder> {
    let trap: &'static TrapState = Box::leak(Box::new(TrapState::new()));
    let nop = encode::nop(NOP_BYTES);
    let mut text = [0; NOP_BYTES];
    text.copy_from_slice(&nop);
    let host = Recorder { trap, text, code_bytes: 0, unused: false, events: Vec::new() };
    let site = SiteSpec { address: SITE, name: "traced".into(), original: nop, rest: nop };
    let mut engine = Engine::new(host, trap, vec![site]).expect("the site is fine");
    engine.host_mut().events.clear();
    engine
}

fn ops(name: &str) -> OpsSpec {
    let (entry, nowhere) = (Addr::new(0x40_4000), Addr::default());
    let callback = Callback { entry, data: nowhere, recursions: nowhere, clobbers: Clobbers::NOTHING };
    OpsSpec { name: name.into(), filter: Filter::all(), flags: OpsFlags::default(), callback }
}

const BATCH: [Event; 7] = [
    Event::ReadText(false),
    Event::WriteInt3(true),
    Event::Barrier(true),
    Event::WriteTail(true),
    Event::Barrier(true),
    Event::WriteHead(true),
    Event::Barrier(true),
];

#[test]
fn trampolines_come_before_the_batch_and_go_behind_a_grace_period() {
    let mut engine = engine();
    let first = engine.register(ops("first")).expect("it matches");
    let second = engine.register(ops("second")).expect("it matches");
    let with_trampoline = [&[Event::WriteTrampoline], &BATCH[..]].concat();
    // nop -> call, call -> call.
    for id in [first, second] {
        engine.host_mut().events.clear();
        engine.enable(id).expect("the text is as expected");
        assert_eq!(engine.host().events, with_trampoline);
        assert!(!engine.host().batch_is_live(), "retired");
    }
    // call -> call: the ops that stays gets a trampoline of its own.
    engine.host_mut().events.clear();
    engine.unregister(first).expect("the text is as expected");
    assert_eq!(engine.host().events, with_trampoline);

    engine.host_mut().events.clear();
    assert!(engine.reclaim().is_empty());
    assert_eq!(engine.host().events, [Event::AskWhetherUnused], "somebody is still inside");
    engine.host_mut().unused = true;
    assert_eq!(engine.reclaim(), [first]);
    assert_eq!(engine.host().events[1..3], [Event::AskWhetherUnused, Event::FreeTrampoline]);

    // call -> nop.
    engine.host_mut().events.clear();
    engine.disable(second).expect("the text is as expected");
    assert_eq!(engine.host().events, BATCH);
}
