//! The engine on the fake host: what is poked, in which order, and what is left after a failure.

use alloc::{boxed::Box, format, string::ToString, vec, vec::Vec};

use super::*;
use crate::{
    Mode,
    fake::{Event, FakeError, FakeHost, text_of_nops},
    insn::{Clobbers, InsnBytes, encode},
    ops::{Callback, OpsFlags},
    poke::TextWrite,
};

const NAMES: [&str; 4] = ["parse_header", "parse_body", "write_body", "main"];

fn site(index: usize) -> Addr {
    FakeHost::TEXT.offset(16 * i64::try_from(index).unwrap())
}

fn engine(mode: Mode) -> Engine<FakeHost> {
    let specs = NAMES.iter().enumerate().map(|(index, name)| SiteSpec {
        address: site(index),
        name: (*name).into(),
        original: encode::nop(5),
        rest: encode::nop(5),
    });
    let trap = Box::leak(Box::new(TrapState::new()));
    Engine::new(FakeHost::new(mode, text_of_nops(NAMES.len())), trap, specs.collect()).unwrap()
}

fn spec(name: &str, filter: Filter) -> OpsSpec {
    let entry = Addr::new(0x40_4000);
    let callback = Callback { entry, data: Addr::default(), recursions: Addr::default(), clobbers: Clobbers::NOTHING };
    OpsSpec { name: name.into(), filter, flags: OpsFlags::default(), callback }
}

fn text_at(engine: &Engine<FakeHost>, index: usize) -> InsnBytes {
    InsnBytes::new(&engine.host().text[16 * index..16 * index + 5])
}

fn call_target(engine: &Engine<FakeHost>, index: usize) -> Option<Addr> {
    match Effect::decode(engine.host().machine().mode, site(index), &text_at(engine, index)).unwrap() {
        Effect::Call { target, .. } => Some(target),
        _ => None,
    }
}

#[test]
fn enabling_pokes_all_matching_sites_in_one_batch_of_three_barriers() {
    for mode in [Mode::Bits32, Mode::Bits64] {
        let mut engine = engine(mode);
        let id = engine.register(spec("a", Filter::name("parse_*"))).unwrap();
        assert_eq!(engine.host().events, [], "registering writes nothing");
        engine.enable(id).unwrap();
        let writes: Vec<usize> = engine
            .host()
            .events
            .iter()
            .map(|event| match event {
                Event::Write(writes) => writes.len(),
                Event::Sync | Event::IsUnused => 0,
            })
            .collect();
        assert_eq!(writes, [2, 0, 2, 0, 2, 0]);
        assert_eq!(engine.stats(), Stats { batches: 1, pokes: 2, syncs: 3 });
        assert!(call_target(&engine, 0).is_some() && call_target(&engine, 0) == call_target(&engine, 1));
        assert_eq!(call_target(&engine, 2), None);
        engine.disable(id).unwrap();
        assert_eq!(engine.host().text, text_of_nops(NAMES.len()));
    }
}

#[test]
fn no_cpu_can_see_a_torn_instruction_between_two_writes() {
    let mut engine = engine(Mode::Bits64);
    let a = engine.register(spec("a", Filter::name("main"))).unwrap();
    engine.enable(a).unwrap();
    let old = text_at(&engine, 3);
    engine.host_mut().events.clear();
    let b = engine.register(spec("b", Filter::name("main"))).unwrap();
    engine.enable(b).unwrap();
    let new = text_at(&engine, 3);
    let write = |offset, bytes: &[u8]| {
        Event::Write(vec![TextWrite { at: site(3).offset(offset), bytes: InsnBytes::new(bytes) }])
    };
    let expected = [write(0, &[0xcc]), Event::Sync, write(1, &new[1..]), Event::Sync, write(0, &new[..1]), Event::Sync];
    assert_eq!(engine.host().events, expected);
    assert_ne!(old, new, "one ops has another trampoline than two");
}

#[test]
fn a_second_ops_changes_only_the_sites_they_share() {
    let mut engine = engine(Mode::Bits64);
    let a = engine.register(spec("a", Filter::name("parse_*"))).unwrap();
    let b = engine.register(spec("b", Filter::name("*_body"))).unwrap();
    engine.enable(a).unwrap();
    let only_a = call_target(&engine, 0);
    engine.enable(b).unwrap();
    assert_eq!(call_target(&engine, 0), only_a);
    assert_ne!(call_target(&engine, 1), only_a, "both: the list trampoline");
    assert_ne!(call_target(&engine, 1), call_target(&engine, 2));
    let attached: Vec<_> = (0..4).map(|index| engine.attached(site(index)).unwrap()).collect();
    assert_eq!(attached, [1, 2, 1, 0]);
    assert_eq!(engine.attached(site(0).offset(1)), None);
    engine.disable(b).unwrap();
    assert_eq!(call_target(&engine, 1), only_a, "back at the first one's own trampoline");
}

#[test]
fn another_filter_keeps_the_sites_that_match_both_untouched() {
    let mut engine = engine(Mode::Bits64);
    let id = engine.register(spec("a", Filter::name("parse_*"))).unwrap();
    engine.enable(id).unwrap();
    engine.host_mut().events.clear();
    engine.set_filter(id, Filter::name("*_body")).unwrap();
    let Event::Write(int3s) = &engine.host().events[0] else { panic!("a batch begins with a write") };
    let poked: Vec<Addr> = int3s.iter().map(|write| write.at).collect();
    assert_eq!(poked, [site(0), site(2)]);
    assert!(call_target(&engine, 1).is_some());
}

#[test]
fn whatever_step_fails_the_text_and_the_ops_stay_as_they_were() {
    // Two sites a batch: each of the three writes can fail half way, and each of the three barriers.
    for fail_after in 0..6 {
        let mut engine = engine(Mode::Bits64);
        let id = engine.register(spec("a", Filter::name("parse_*"))).unwrap();
        engine.host_mut().fail_after = Some(fail_after);
        engine.host_mut().failures = Some(1);
        assert_eq!(engine.enable(id), Err(EngineError::Host(FakeError::Ordered)), "failure {fail_after}");
        assert_eq!(engine.host().text, text_of_nops(NAMES.len()), "failure {fail_after}");
        assert_eq!(engine.stats().pokes, 0);
        engine.enable(id).unwrap();
        assert!(call_target(&engine, 0).is_some(), "the engine works on after failure {fail_after}");
    }
}

#[test]
fn a_failure_that_cannot_be_undone_keeps_the_batch_emulated() {
    let mut engine = engine(Mode::Bits64);
    let id = engine.register(spec("a", Filter::name("parse_*"))).unwrap();
    engine.host_mut().fail_after = Some(2);
    assert_eq!(engine.enable(id), Err(EngineError::Stuck));
    assert_eq!(engine.host().text[0], 0xcc);
    let decision = engine.trap.decide(site(0).offset(1), |_| 0xcc, |effect| effect);
    assert!(matches!(decision, crate::trap::Decision::Emulate(Effect::Call { .. })), "{decision:?}");
    engine.host_mut().fail_after = None;
    engine.unregister(id).unwrap();
    assert_eq!(engine.reclaim(), [], "the int3s that are left lead to its trampoline");
    assert_eq!(engine.host().freed, []);
    let id = engine.register(spec("b", Filter::name("parse_*"))).unwrap();
    assert_eq!(engine.enable(id), Err(EngineError::Stuck), "no further poke may disturb the published batch");
}

#[test]
fn text_that_differs_is_refused_before_the_first_write() {
    let mut engine = engine(Mode::Bits64);
    let id = engine.register(spec("a", Filter::name("parse_*"))).unwrap();
    engine.host_mut().text[16] = 0xcc;
    let before = engine.host().text.clone();
    let error = engine.enable(id).unwrap_err();
    let EngineError::Text(mismatch) = &error else { panic!("{error}") };
    assert_eq!((mismatch.at, mismatch.expected, mismatch.found[0]), (site(1), encode::nop(5), 0xcc));
    assert!(error.to_string().contains("expected 0f 1f 44 00 00 at 0x400010, found cc 1f 44 00 00"), "{error}");
    assert_eq!(engine.host().text, before);
    assert_eq!(engine.host().events, []);
}

#[test]
fn a_second_ip_modify_on_a_site_is_refused_by_name() {
    let mut engine = engine(Mode::Bits64);
    let ip_modify = |name: &str, filter| OpsSpec {
        flags: OpsFlags { ip_modify: true, ..OpsFlags::default() },
        ..spec(name, filter)
    };
    let patch = engine.register(ip_modify("patch", Filter::name("main"))).unwrap();
    let error = engine.register(ip_modify("other", Filter::all())).unwrap_err();
    assert_eq!(error, EngineError::IpModifyTaken { site: site(3), name: "main".into(), holder: "patch".into() });
    let other = engine.register(ip_modify("other", Filter::all().except("main"))).unwrap();
    let error = engine.set_filter(other, Filter::all()).unwrap_err();
    assert!(matches!(error, EngineError::IpModifyTaken { .. }), "widening a filter is no way around");
    engine.set_filter(patch, Filter::name("main")).unwrap();
    engine.unregister(patch).unwrap();
    engine.set_filter(other, Filter::all()).unwrap();
}

#[test]
fn an_ip_modify_is_called_behind_those_that_ask_for_the_site() {
    let mut engine = engine(Mode::Bits64);
    let mut register = |name, ip_modify, data| {
        let mut spec = spec(name, Filter::name("main"));
        spec.flags.ip_modify = ip_modify;
        spec.callback.data = Addr::new(data);
        engine.register(spec).unwrap()
    };
    let members = [register("older", false, 1), register("patch", true, 2), register("younger", false, 3)];
    let order: Vec<u64> = engine.calls(&members).iter().map(|call| call.data.value()).collect();
    assert_eq!(order, [1, 3, 2]);
}

#[test]
fn a_filter_that_selects_nothing_names_what_is_near() {
    let mut engine = engine(Mode::Bits64);
    let error = engine.register(spec("a", Filter::name("parse_haeder"))).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the filter matches none of 4 sites (asked for: parse_haeder); did you mean parse_header?"
    );
    let error = engine.register(spec("a", Filter::address(site(1).offset(2)))).unwrap_err();
    assert_eq!(error.to_string(), "0x400012 is no site; the nearest is 0x400010 (parse_body)");
}

#[test]
fn exhausted_memory_is_an_error_and_nothing_is_written() {
    let mut engine = engine(Mode::Bits64);
    engine.host_mut().code_bytes = 0;
    let id = engine.register(spec("a", Filter::all())).unwrap();
    assert_eq!(engine.enable(id), Err(EngineError::Host(FakeError::NoMemory)));
    assert_eq!(engine.host().events, []);
}

#[test]
fn code_is_reclaimed_after_a_grace_period_and_not_before() {
    let mut engine = engine(Mode::Bits64);
    let a = engine.register(spec("a", Filter::all())).unwrap();
    let b = engine.register(spec("b", Filter::name("main"))).unwrap();
    engine.enable(a).unwrap();
    engine.enable(b).unwrap();
    engine.unregister(b).unwrap();
    engine.host_mut().unused = false;
    assert_eq!(engine.reclaim(), []);
    assert_eq!((engine.retired(), engine.host().freed.len()), (1, 0));
    engine.host_mut().unused = true;
    assert_eq!(engine.reclaim(), [b]);
    assert_eq!(engine.host().freed.len(), 1, "the trampoline of both; that of the first lives on");
    assert_eq!(engine.enable(b), Err(EngineError::UnknownOps(b)));
    assert_eq!(engine.reclaim(), [], "nothing is left to reclaim");
}

#[test]
fn release_puts_the_original_bytes_back() {
    // Five one-byte nops, as GCC lays them out for -fpatchable-function-entry=5.
    let original = InsnBytes::new(&[0x90; 5]);
    let spec_of = |index: usize| SiteSpec {
        address: site(index),
        name: format!("f{index}").into(),
        original,
        rest: encode::nop(5),
    };
    let text = vec![0x90; 64];
    let trap = Box::leak(Box::new(TrapState::new()));
    let mut engine =
        Engine::new(FakeHost::new(Mode::Bits64, text.clone()), trap, vec![spec_of(0), spec_of(1)]).unwrap();
    engine.host_mut().unused = false;
    assert_eq!(engine.settle(), Err(EngineError::Busy), "a thread may stand between two nops");
    assert_eq!(engine.host().text, text);
    engine.host_mut().unused = true;
    engine.host_mut().events.clear();
    engine.settle().unwrap();
    assert!(matches!(engine.host().events[..3], [Event::Write(_), Event::Sync, Event::IsUnused]));
    assert_eq!(text_at(&engine, 1), encode::nop(5));
    let id = engine.register(spec("a", Filter::all())).unwrap();
    engine.enable(id).unwrap();
    engine.release().unwrap();
    assert_eq!(engine.host().text, text);
}

#[test]
fn sites_that_cannot_be_used_are_refused() {
    let trap: &'static TrapState = Box::leak(Box::new(TrapState::new()));
    let make = |specs| Engine::new(FakeHost::new(Mode::Bits64, text_of_nops(1)), trap, specs).map(drop).unwrap_err();
    let spec = |at, rest| SiteSpec { address: at, name: "f".into(), original: encode::nop(5), rest };
    assert_eq!(
        make(vec![spec(site(0).offset(3), encode::nop(5)), spec(site(0), encode::nop(5))]),
        EngineError::BadSite(crate::BadSite::Overlap { first: site(0), second: site(0).offset(3) })
    );
    assert!(matches!(make(vec![spec(site(0), InsnBytes::new(&[0x90; 5]))]), EngineError::BadSite(_)));
    let short = EngineError::BadSite(crate::BadSite::Length { at: site(0), original_bytes: 5, rest_bytes: 4 });
    assert_eq!(make(vec![spec(site(0), encode::nop(4))]), short);
}
