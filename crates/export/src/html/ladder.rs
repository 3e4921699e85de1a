//! Levels of detail of one thread's calls.
//!
//! Owns the [`Ladder`]. Each of its *steps* is a duration, the first one 0. A call is told once as itself, at the longest step that it is not shorter than; at every longer step, calls that
//! are shorter than the step are told as *runs*: neighbours of the same depth that lie together within the step. So who draws with `p` nanoseconds a pixel takes the longest step up to `p`: its runs, and
//! the calls of this step and all longer ones. Invariants: a run is no longer than its step, and two runs that follow each other at a depth are longer together, so that there are at
//! most `2 p / step + 1` to a pixel; the calls of all runs of a step, and of all calls at it and above, are all calls.

/// The first step that is not 0.
const FIRST_NS: u64 = 256;

/// From one step to the next.
const FACTOR: u64 = 4;

/// The last step divides a trace into so many parts at least: no screen has fewer pixels.
const LEAST_PARTS: u64 = 1024;

/// A call, or some of them that lie next to each other at one depth of a thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    pub(super) depth: u32,
    pub(super) start_ns: u64,
    pub(super) end_ns: u64,
    /// The one that most of the time belongs to, as far as one memory cell can tell.
    pub(super) function: u32,
    pub(super) calls: u64,
}

/// Takes pieces.
pub(super) trait Shelf {
    /// A call whose step is this.
    fn call(&mut self, step: usize, call: Piece);

    /// Calls that are shorter than this step.
    fn run(&mut self, step: usize, run: Piece);

    /// A step whose pieces are to be put away: all runs that have begun at it are told before.
    fn full(&self) -> Option<usize> {
        None
    }

    /// Puts a step's pieces away.
    fn close(&mut self, _step: usize) {}
}

/// See the module's text.
pub(super) struct Ladder {
    steps: Vec<u64>,
    /// For each step and depth, the run that goes on.
    runs: Vec<Vec<Option<Run>>>,
}

/// A run that has begun.
#[derive(Clone, Copy)]
struct Run {
    piece: Piece,
    /// Time that belongs to its calls.
    busy_ns: u64,
    /// By how much the function leads (Boyer and Moore's vote, weighted by time).
    lead: u64,
}

/// All steps that make sense for a trace.
pub(super) fn steps(duration_ns: u64) -> Vec<u64> {
    let later = std::iter::successors(Some(FIRST_NS), |step| step.checked_mul(FACTOR));
    std::iter::once(0).chain(later.take_while(|step| *step <= duration_ns / LEAST_PARTS)).collect()
}

impl Ladder {
    /// With these steps, of which the first one is 0.
    pub(super) fn new(steps: Vec<u64>) -> Self {
        let runs = vec![Vec::new(); steps.len()];
        Self { steps, runs }
    }

    /// The thread's next call that has ended.
    pub(super) fn call(&mut self, call: Piece, to: &mut impl Shelf) {
        let duration_ns = call.end_ns - call.start_ns;
        let step = self.steps.partition_point(|step| *step <= duration_ns) - 1;
        // What goes on at this depth was before.
        for step in 1..=step {
            self.end_run(step, call.depth as usize, to);
        }
        to.call(step, call);
        self.lay(step + 1, Run { piece: call, busy_ns: duration_ns, lead: duration_ns + 1 }, to);
        while let Some(step) = to.full() {
            self.end_runs(step, to);
            to.close(step);
        }
    }

    /// The thread has no more calls.
    pub(super) fn end(&mut self, to: &mut impl Shelf) {
        for step in 0..self.steps.len() {
            self.end_runs(step, to);
            to.close(step);
        }
    }

    fn lay(&mut self, step: usize, next: Run, to: &mut impl Shelf) {
        let Some(runs) = self.runs.get_mut(step) else { return };
        let depth = next.piece.depth as usize;
        if runs.len() <= depth {
            runs.resize(depth + 1, None);
        }
        match &mut runs[depth] {
            Some(run) if next.piece.end_ns - run.piece.start_ns <= self.steps[step] => run.join(&next),
            run => {
                if let Some(ended) = run.replace(next) {
                    self.tell(step, ended, to);
                }
            }
        }
    }

    fn end_run(&mut self, step: usize, depth: usize, to: &mut impl Shelf) {
        if let Some(run) = self.runs[step].get_mut(depth).and_then(Option::take) {
            self.tell(step, run, to);
        }
    }

    fn end_runs(&mut self, step: usize, to: &mut impl Shelf) {
        for depth in 0..self.runs[step].len() {
            self.end_run(step, depth, to);
        }
    }

    /// A run is what the next step's runs are made of.
    fn tell(&mut self, step: usize, run: Run, to: &mut impl Shelf) {
        to.run(step, run.piece);
        self.lay(step + 1, Run { lead: run.busy_ns + 1, ..run }, to);
    }
}

impl Run {
    fn join(&mut self, next: &Self) {
        self.piece.end_ns = next.piece.end_ns.max(self.piece.end_ns);
        self.piece.calls += next.piece.calls;
        self.busy_ns += next.busy_ns;
        if self.piece.function == next.piece.function {
            self.lead += next.lead;
        } else if self.lead >= next.lead {
            self.lead -= next.lead;
        } else {
            self.lead = next.lead - self.lead;
            self.piece.function = next.piece.function;
        }
    }
}

/// How many pieces a step has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Count {
    pub(super) calls: u64,
    pub(super) runs: u64,
}

/// Counts only, to see which steps are worth their place.
impl Shelf for Vec<Count> {
    fn call(&mut self, step: usize, _: Piece) {
        self[step].calls += 1;
    }

    fn run(&mut self, step: usize, _: Piece) {
        self[step].runs += 1;
    }
}

/// Chooses the steps that have at most half of the pieces that would be drawn without them. If there are more than `most` calls, the shortest ones are not told one by one: the second value is the
/// place of the first step among the chosen ones that is told.
pub(super) fn choose(steps: &[u64], counts: &[Count], most: u64) -> (Vec<u64>, usize) {
    let mut chosen = vec![0];
    for step in 1..steps.len() {
        let last = chosen[chosen.len() - 1];
        let without = counts[last].runs + counts[last..step].iter().map(|count| count.calls).sum::<u64>();
        if counts[step].runs <= without / 2 {
            chosen.push(step);
        }
    }
    let pieces = |step: usize| counts[step].runs + counts[step..].iter().map(|count| count.calls).sum::<u64>();
    let first = chosen.iter().position(|step| pieces(*step) <= most).unwrap_or(chosen.len() - 1);
    (chosen.into_iter().map(|step| steps[step]).collect(), first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Told {
        calls: Vec<(usize, Piece)>,
        runs: Vec<(usize, Piece)>,
    }

    impl Shelf for Told {
        fn call(&mut self, step: usize, call: Piece) {
            self.calls.push((step, call));
        }

        fn run(&mut self, step: usize, run: Piece) {
            self.runs.push((step, run));
        }
    }

    /// Calls of one to some thousand nanoseconds, at three depths, each level within the one above.
    fn calls() -> Vec<Piece> {
        let mut numbers = std::iter::successors(Some(1_u64), |number| Some(number.wrapping_mul(48_271) % 0x7fff_ffff));
        let mut calls = Vec::new();
        let mut at = 0;
        for outer in 0..400_u64 {
            let start = at;
            for _ in 0..outer % 7 {
                let long = numbers.next().unwrap_or(1) % 97 * if outer % 50 == 0 { 300 } else { 3 };
                let function = u32::from(long % 2 == 0);
                at += numbers.next().unwrap_or(1) % 40;
                calls.push(Piece { depth: 1, start_ns: at, end_ns: at + long, function, calls: 1 });
                at += long;
            }
            calls.push(Piece { depth: 0, start_ns: start, end_ns: at, function: 2, calls: 1 });
            at += 11;
        }
        calls
    }

    fn told(steps: &[u64]) -> Told {
        let (mut ladder, mut told) = (Ladder::new(steps.to_vec()), Told::default());
        for call in calls() {
            ladder.call(call, &mut told);
        }
        ladder.end(&mut told);
        told
    }

    #[test]
    fn each_step_has_all_calls_in_few_pieces() {
        let steps = [0, 256, 1024, 4096];
        let (all, told) = (calls(), told(&steps));
        assert_eq!(told.calls.len(), all.len());
        for (step, limit) in steps.iter().enumerate() {
            let single = told.calls.iter().filter(|(at, _)| *at >= step).count() as u64;
            let runs: Vec<&Piece> = told.runs.iter().filter(|(at, _)| *at == step).map(|(_, run)| run).collect();
            assert_eq!(single + runs.iter().map(|run| run.calls).sum::<u64>(), all.len() as u64, "step {step}");
            for depth in [0, 1] {
                let row: Vec<&&Piece> = runs.iter().filter(|run| run.depth == depth).collect();
                assert!(row.iter().all(|run| run.end_ns - run.start_ns <= *limit));
                let between = |two: &[&&Piece]| {
                    let long = told.calls.iter().any(|(at, call)| {
                        *at >= step
                            && call.depth == depth
                            && call.start_ns >= two[0].end_ns
                            && call.end_ns <= two[1].start_ns
                    });
                    two[0].end_ns <= two[1].start_ns && (long || two[1].end_ns - two[0].start_ns > *limit)
                };
                // A run that was put off by a long call may be short; no other one.
                let odd = row.windows(2).filter(|two| !between(two)).count();
                assert!(odd * 4 <= row.len(), "step {step}, depth {depth}: {odd} of {}", row.len());
            }
        }
    }

    #[test]
    fn a_run_has_the_function_that_most_of_its_time_belongs_to() {
        let (mut ladder, mut told) = (Ladder::new(vec![0, 256]), Told::default());
        for (function, start_ns, end_ns) in [(7, 0, 10), (8, 10, 70), (7, 70, 90)] {
            ladder.call(Piece { depth: 0, start_ns, end_ns, function, calls: 1 }, &mut told);
        }
        ladder.end(&mut told);
        assert_eq!(told.runs, [(1, Piece { depth: 0, start_ns: 0, end_ns: 90, function: 8, calls: 3 })]);
    }

    #[test]
    fn steps_that_merge_little_are_left_out_and_too_many_calls_are_merged() {
        let steps = [0, 256, 1024, 4096];
        let count = |calls, runs| Count { calls, runs };
        let counts = [count(1000, 0), count(10, 900), count(5, 100), count(1, 20)];
        assert_eq!(choose(&steps, &counts, 2000), (vec![0, 1024, 4096], 0));
        assert_eq!(choose(&steps, &counts, 500), (vec![0, 1024, 4096], 1));
        assert_eq!(choose(&steps, &counts, 1), (vec![0, 1024, 4096], 2));
        assert_eq!(choose(&[0], &[count(0, 0)], 5), (vec![0], 0));
    }

    #[test]
    fn steps_follow_the_length_of_the_trace() {
        assert_eq!(super::steps(1000), [0]);
        assert_eq!(super::steps(FIRST_NS * LEAST_PARTS * FACTOR), [0, FIRST_NS, FIRST_NS * FACTOR]);
        assert!(super::steps(u64::MAX).len() < 32);
    }
}
