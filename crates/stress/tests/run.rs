//! The stress test as a library: what a run shows, and that it leaves the process as it found it.
//!
//! One test only: there can be but one tracer in a process.

use trapline_process::Resume;
use trapline_stress::{CONTEXT_NAMES, MAX_SLOTS, Options, Phase, Verdict, run};

#[test]
fn runs_follow_each_other_in_one_process() {
    let options = Options { seconds: 1, threads: 2, resume: Resume::Slots, slots: MAX_SLOTS };
    for resume in [Resume::Slots, Resume::Skip, Resume::Slots] {
        let report = run(&Options { resume, ..options }).expect("the tracer can be had again and again");
        let (account, expected) =
            (report.total(), if resume == Resume::Skip { Verdict::Failed } else { Verdict::Clean });
        assert_eq!(report.verdict(), expected, "{report:?}");
        assert_eq!(account.corrupted, 0);
        let phases = Phase::ALL.map(|phase| report.phase(phase));
        assert_eq!(phases.iter().map(|tally| tally.calls).sum::<u64>(), account.total().calls);
        // The tracer and the plan agree about which sites had to be rewritten.
        assert_eq!(report.pokes.iter().sum::<u64>(), report.stats.pokes);
        for (name, context) in CONTEXT_NAMES.iter().zip(&report.contexts) {
            assert!(context.total().calls > 0, "{name}");
        }
        if resume == Resume::Skip {
            // What is skipped is missed where an ops is attached before and after, and only while that changes.
            for phase in [Phase::Nop, Phase::Call, Phase::List, Phase::NopToCall, Phase::CallToNop] {
                assert_eq!(report.phase(phase).missed, 0, "{}", phase.name());
            }
            let lists =
                [Phase::CallToList, Phase::ListToList, Phase::ListToCall].map(|phase| report.phase(phase).missed);
            assert!(lists.iter().sum::<u64>() > 0);
        }
    }
}
