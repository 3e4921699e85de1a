//! What is explored, and what has to come of it.
//!
//! Owns [`Run`] and the three lists: the [`real`] machines, which must hold in every state; the [`mutants`], each of which must break the invariant
//! that it is expected to; and the [`harmless`] ones, mutants in a setting where something else covers for them, so that it is known why. The
//! binary and the tests walk them. Invariant: a run whose exploration is cut short, or never gets to where it should, has failed.

use trapline_engine::{
    poke::{Part, Version},
    trap::Resume,
};

use crate::{
    explore::{Invariant, Landmarks, Verdict, explore},
    poke::{
        self, PokeModel,
        scenario::{
            Content::{self, CallA, CallB, Nop, Nops},
            Machine::{self, Kernel, Process},
            Mutant, Scenario,
        },
    },
    slots::{self, Setting, SlotModel},
};

/// How far to go.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Bounds {
    /// Seconds without optimisation.
    Small,
    /// Seconds with it.
    Standard,
    /// Minutes, and several GB.
    Deep,
}

/// No exploration is larger; the largest state has 300 bytes.
const MAX_STATES: usize = 40_000_000;

/// What is explored.
#[derive(Clone, Debug)]
pub enum Subject {
    /// The poke protocol.
    Poke(Scenario),
    /// The slots.
    Slots(Setting),
}

/// What has to come of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Expectation {
    /// All states are visited, no invariant breaks, and all this happens on the way.
    Holds(Landmarks),
    /// This invariant breaks.
    Breaks(Invariant),
}

/// One exploration.
#[derive(Clone, Debug)]
pub struct Run {
    /// What is special about it; of a mutant: which.
    pub title: String,
    /// What is explored.
    pub subject: Subject,
    /// What has to come of it.
    pub expectation: Expectation,
}

impl Run {
    /// Explores.
    pub fn explore(&self) -> Verdict {
        match &self.subject {
            Subject::Poke(scenario) => explore(&PokeModel::new(scenario.clone()), MAX_STATES),
            Subject::Slots(setting) => explore(&SlotModel::new(*setting), MAX_STATES),
        }
    }

    /// What is wrong with a verdict; `None` if it is as expected.
    pub fn complaint(&self, verdict: &Verdict) -> Option<String> {
        match (self.expectation, verdict) {
            (Expectation::Holds(expected), Verdict::Holds { landmarks, .. }) => (!landmarks.contains(expected))
                .then(|| format!("holds, but got only to landmarks {:#x} of {:#x}", landmarks.0, expected.0)),
            (Expectation::Breaks(expected), Verdict::Violated { violation, .. }) => (violation.invariant != expected)
                .then(|| format!("breaks {}, and was expected to break {expected}", violation.invariant)),
            (Expectation::Holds(_), Verdict::Violated { violation, .. }) => {
                Some(format!("breaks {}", violation.invariant))
            }
            (Expectation::Breaks(expected), Verdict::Holds { states, .. }) => {
                Some(format!("holds in all {states} states, and was expected to break {expected}"))
            }
            (_, Verdict::Unfinished { states }) => Some(format!("has more than {states} states")),
        }
    }

    /// The setting, in words.
    pub fn setting(&self) -> String {
        match &self.subject {
            Subject::Poke(scenario) => format!("poke, {scenario}"),
            Subject::Slots(setting) => format!("slots, {setting}"),
        }
    }
}

/// The engine's own machines. Nothing may break.
pub fn real(bounds: Bounds) -> Vec<Run> {
    let mut runs = Vec::new();
    for machine in [Process, Kernel] {
        runs.extend(real_pokes(machine, bounds).into_iter().map(|scenario| Run {
            title: String::new(),
            expectation: Expectation::Holds(landmarks_of(&scenario)),
            subject: Subject::Poke(scenario),
        }));
    }
    runs.extend(real_slots(bounds).into_iter().map(|setting| Run {
        title: String::new(),
        expectation: Expectation::Holds(landmarks_of_slots(&setting)),
        subject: Subject::Slots(setting),
    }));
    runs
}

fn real_pokes(machine: Machine, bounds: Bounds) -> Vec<Scenario> {
    let site = |old, new| Scenario::one_site(machine, old, new);
    let [small, middle, large] = match bounds {
        Bounds::Small => [[1, 1], [2, 1], [2, 2]],
        Bounds::Standard => [[1, 1], [2, 2], [3, 3]],
        Bounds::Deep => [[2, 2], [3, 2], [3, 3]],
    };
    let mut scenarios = vec![
        // One batch, one site.
        site(Nop, CallA).contexts(large),
        site(CallA, CallB).contexts(large),
        site(CallA, Nop).contexts(large),
        site(CallA, CallB).far().contexts(middle),
        site(CallA, CallB).bits32().contexts(middle),
        // Failures anywhere.
        site(Nop, CallA).failures(2).contexts(middle),
        site(CallA, CallB).failures(2).contexts(middle),
        site(CallA, Nop).failures(2).contexts(middle),
        site(Nop, CallA).second_site(CallA, CallB).failures(2).contexts(small),
        // Several sites.
        site(Nop, CallA).second_site(CallA, CallB).contexts(small),
        site(CallA, Nop).second_site(CallB, CallA).contexts(small),
        // Several instructions.
        site(Nops, Nop).contexts(middle),
        site(Nop, Nops).contexts(middle),
        site(Nops, Nop).failures(2).contexts(small),
        site(Nop, Nops).failures(2).contexts(small),
        site(Nops, Nop).then(0, CallA).then(0, Nop).then(0, Nops).contexts(small),
    ];
    // Several batches, whose late arrivals meet the next one.
    scenarios.extend([
        site(Nop, CallA).then(0, CallB).then(0, Nop).contexts(middle),
        site(CallA, Nop).then(0, CallA).contexts(middle),
        site(CallA, CallB).then(0, CallA).contexts(middle),
        site(Nop, CallA).second_site(Nop, CallA).then(1, CallB).contexts(small),
    ]);
    if bounds > Bounds::Small {
        scenarios.push(site(CallA, CallB).second_site(CallA, CallB).contexts([2, 2]));
    }
    scenarios
}

/// What a scenario has to come by, or its result would mean nothing.
fn landmarks_of(scenario: &Scenario) -> Landmarks {
    use poke::landmark as l;
    let becomes = |wanted: fn(Content) -> bool| scenario.batches.iter().flatten().any(|(_, new)| wanted(*new));
    let has_nops = scenario.sites.contains(&Nops) || becomes(|new| new == Nops);
    let frees = !scenario.sites.iter().all(|site| matches!(site, Nop | Nops)) || scenario.batches.len() > 2;
    [
        (l::TRAP | l::STALE | l::COMMITTED | l::LEFT, true),
        (l::NESTED_TRAP, scenario.contexts != [1, 1]),
        (l::EMULATED_CALL, becomes(|new| matches!(new, CallA | CallB))),
        (l::EMULATED_NOP, becomes(|new| matches!(new, Nop | Nops))),
        (l::REWOUND, scenario.machine == Process),
        (l::LOOKED_AGAIN, scenario.machine == Process && scenario.batches.len() > 1),
        (l::ABORTED, scenario.failures > 0),
        (l::STUCK, scenario.failures > 1),
        (l::FREED, frees && scenario.sites.len() == 1),
        (l::BETWEEN, has_nops),
    ]
    .into_iter()
    .filter(|(_, wanted)| *wanted)
    .fold(Landmarks::default(), |all, (landmark, _)| all | landmark)
}

fn real_slots(bounds: Bounds) -> Vec<Setting> {
    let mut settings = Vec::new();
    for setting in [Setting::PROCESS_64, Setting::PROCESS_32, Setting::KERNEL_64] {
        // More contexts than slots, and as many.
        settings.push(setting.nested(3, 2));
        settings.push(setting.nested(3, 1));
        settings.push(setting.nested(3, 3));
        settings.push(setting.nested(3, 2).resume(Resume::Push));
        if bounds > Bounds::Small {
            settings.push(setting.nested(4, 2));
            settings.push(setting.nested(4, 4));
        }
        if bounds == Bounds::Deep {
            settings.push(setting.nested(5, 3));
        }
    }
    settings
}

fn landmarks_of_slots(setting: &Setting) -> Landmarks {
    use slots::landmark as l;
    let always = l::HANDLER_INTERRUPTED | l::FINISHED;
    if setting.resume != Resume::Slots {
        return always;
    }
    let overflow = if setting.contexts > setting.slots { l::OVERFLOW } else { Landmarks::default() };
    always | l::TRAMPOLINE_INTERRUPTED | l::FULL | overflow
}

fn broken(title: &impl ToString, subject: Subject, breaks: Invariant) -> Run {
    Run { title: title.to_string(), subject, expectation: Expectation::Breaks(breaks) }
}

/// Everything that has to be found.
pub fn mutants() -> Vec<Run> {
    use Invariant::{CleanLeave, NoSkippedCall, NoTornInstruction, Transparency};
    use Mutant::{
        GraceOverlooksHandlers, HeadsBeforeTails, NoBarrierAfter, NoGraceBetweenInstructions, NoGracePeriod,
        PublishAfterInt3, RetireBeforeLastBarrier, SitesUnknown, TrampolinesAfterInt3, TrapsDoNotSerialise,
    };
    use Part::{Head, Int3, Tail};
    use Version::{New, Old};
    use slots::Mutant as SlotMutant;

    let call_to_call = Scenario::one_site(Process, CallA, CallB);
    let in_kernel = Scenario::one_site(Kernel, CallA, CallB);
    let nop_call_nop = Scenario::one_site(Process, Nop, CallA).then(0, Nop);
    let failing = call_to_call.clone().failures(1);
    let pokes = [
        (NoBarrierAfter(Int3, New), &call_to_call, NoTornInstruction),
        (NoBarrierAfter(Tail, New), &call_to_call, NoTornInstruction),
        (NoBarrierAfter(Head, New), &call_to_call, CleanLeave),
        (NoBarrierAfter(Head, New), &in_kernel, Transparency),
        (HeadsBeforeTails, &call_to_call, NoTornInstruction),
        (RetireBeforeLastBarrier, &in_kernel, Transparency),
        (PublishAfterInt3, &call_to_call, Transparency),
        (TrampolinesAfterInt3, &call_to_call, NoSkippedCall),
        (NoGracePeriod, &call_to_call, NoSkippedCall),
        (GraceOverlooksHandlers, &nop_call_nop, NoSkippedCall),
        (NoGraceBetweenInstructions, &Scenario::one_site(Process, Nops, Nop), NoTornInstruction),
        (NoGraceBetweenInstructions, &Scenario::one_site(Process, Nop, Nops).failures(1), NoTornInstruction),
        (NoBarrierAfter(Int3, Old), &failing, NoTornInstruction),
        (NoBarrierAfter(Tail, Old), &failing, NoTornInstruction),
        (NoBarrierAfter(Head, Old), &failing, CleanLeave),
        (SitesUnknown, &call_to_call, Transparency),
        (TrapsDoNotSerialise, &call_to_call, NoSkippedCall),
    ];
    let mut runs: Vec<Run> = pokes
        .into_iter()
        .map(|(mutant, scenario, breaks)| broken(&mutant, Subject::Poke(scenario.clone().mutant(mutant)), breaks))
        .collect();
    let skip = call_to_call.resume(Resume::Skip);
    runs.push(broken(&"resume strategy `skip`: the old behaviour", Subject::Poke(skip), NoSkippedCall));

    let (process_64, process_32) = (Setting::PROCESS_64, Setting::PROCESS_32);
    let slot_mutants = [
        (SlotMutant::ReleaseBeforeRead, process_64, NoSkippedCall),
        (SlotMutant::RoomAfterUse, process_32, NoSkippedCall),
        (SlotMutant::PopsExchanged, process_64, Transparency),
        (SlotMutant::RoomBySubtraction, process_64, Transparency),
        (SlotMutant::FillBeforeReserve, process_64, NoSkippedCall),
        (SlotMutant::NoLimit, process_64, Transparency),
        (SlotMutant::PushThroughFrame, process_32.resume(Resume::Push), Transparency),
    ];
    runs.extend(
        slot_mutants
            .into_iter()
            .map(|(mutant, setting, breaks)| broken(&mutant, Subject::Slots(setting.mutant(mutant)), breaks)),
    );
    runs
}

/// Mutants that something else covers for. Each of them is among the [`mutants`] in a setting where nothing does.
pub fn harmless() -> Vec<Run> {
    use Mutant::{GraceOverlooksHandlers, RetireBeforeLastBarrier};
    use slots::Mutant as SlotMutant;

    let call_to_call = Scenario::one_site(Process, CallA, CallB);
    let (room, push) = (SlotMutant::RoomAfterUse, SlotMutant::PushThroughFrame);
    let in_red_zone = Setting::PROCESS_64;
    let no_landmarks = Expectation::Holds(Landmarks::default());
    [
        (
            format!("{RetireBeforeLastBarrier}: a handler that knows the sites executes them again"),
            Subject::Poke(call_to_call.mutant(RetireBeforeLastBarrier)),
        ),
        (
            format!("{GraceOverlooksHandlers}: the last barrier has waited for them"),
            Subject::Poke(Scenario::one_site(Kernel, Nop, CallA).then(0, Nop).mutant(GraceOverlooksHandlers)),
        ),
        (format!("{room}: a red zone is room"), Subject::Slots(in_red_zone.mutant(room))),
        (
            format!("{push}: with a red zone it lies elsewhere"),
            Subject::Slots(in_red_zone.resume(Resume::Push).mutant(push)),
        ),
    ]
    .into_iter()
    .map(|(title, subject)| Run { title, subject, expectation: no_landmarks })
    .collect()
}
