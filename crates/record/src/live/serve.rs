//! Patches for processes that are being recorded: the command hands them to the recorder, which is the tracer.
//!
//! Owns both ends. A recorder listens on an abstract socket that is named after the thread that traces ([`Service`]); a command that finds a process traced by
//! it ([`Recorder::of`]) sends a [`Request`], and tells people what is answered, as if it had done it. In the recorder each command has a thread, which prepares
//! everything while the process runs; then the tracer carries it out ([`Job`]). The kernel says who is at the other end: the recorder listens to its own user and to
//! root, the command to the tracer alone. Both are of the same version, as the name has it. Invariant: a command that goes away is not waited for, and what it
//! wanted is not begun any more.

use std::{
    fs,
    io::{self, Read, Write as _},
    os::{
        fd::AsRawFd,
        linux::net::SocketAddrExt,
        unix::{
            fs::MetadataExt,
            net::{SocketAddr, UnixListener, UnixStream},
        },
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
        mpsc::{self, Receiver, Sender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use trapline_patch::Patch;

use super::{Done, How, Listed, LiveError, Process, coming::Coming, going::Going, list_of};
use crate::{
    refusal,
    sys::{
        Tid, descriptors,
        spawn::{self, Waker},
    },
    text::Hidden,
};

/// What a command wants.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// The patch follows, in so many bytes.
    Apply {
        pid: Tid,
        patch_bytes: u64,
        deadline: Duration,
        is_dry_run: bool,
        is_forced: bool,
    },
    Revert {
        pid: Tid,
        name: Option<String>,
        deadline: Duration,
    },
    List {
        pid: Tid,
    },
}

/// What it is told.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done(Box<Done>),
    Listed(Vec<Listed>),
    /// It was refused, in these words.
    Refused(String),
    /// Something failed.
    Failed(String),
    /// The recorder is just coming or leaving.
    Passes,
}

impl From<LiveError> for Answer {
    fn from(error: LiveError) -> Self {
        match error {
            error if error.may_pass() => Self::Passes,
            LiveError::System { .. } => Self::Failed(error.to_string()),
            error => Self::Refused(error.to_string()),
        }
    }
}

/// Requests have names and numbers only, answers what is known of patches.
const LARGEST_MESSAGE: u32 = 64 << 20;
const LARGEST_PATCH: u64 = 1 << 30;

/// How long the other end may take with what it does not have to think about.
const PATIENCE: Duration = Duration::from_secs(20);

/// Something for the tracer to do.
pub(crate) struct Job {
    /// The process.
    pub(crate) pid: Tid,
    pub(crate) what: What,
}

/// What.
pub(crate) enum What {
    /// Say what stands in the process's code that is the recorder's. Nothing if it does not record it.
    Look(Sender<Option<Hidden>>),
    /// Have a patch come.
    Come(Box<Coming>, Client),
    /// Have it go.
    Go(Box<Going>, Client),
}

/// Who waits for that.
pub(crate) struct Client {
    stream: UnixStream,
    answer: Sender<Result<Done, LiveError>>,
}

impl Client {
    /// Whether it is still there.
    pub(crate) fn waits(&self) -> bool {
        // It has nothing to say any more: what can be read is its end.
        let _ = self.stream.set_nonblocking(true);
        let read = (&self.stream).read(&mut [0]);
        let _ = self.stream.set_nonblocking(false);
        matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Says what came of it.
    pub(crate) fn tell(self, outcome: Result<Done, LiveError>) {
        // If its thread is gone, there is nobody to be told.
        let _ = self.answer.send(outcome);
    }
}

/// The socket of the recorder whose tracer is this thread, as our own pid namespace numbers it.
fn address(tracer: Tid) -> io::Result<SocketAddr> {
    let space = fs::metadata("/proc/self/ns/pid").map_or(0, |space| space.ino());
    SocketAddr::from_abstract_name(format!("trapline-recorder-{}-{space}-{tracer}", env!("CARGO_PKG_VERSION")))
}

fn send(mut stream: &UnixStream, message: &impl Serialize, more: &[u8]) -> io::Result<()> {
    let message = serde_json::to_vec(message).map_err(io::Error::other)?;
    let len_bytes = u32::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&len_bytes.to_le_bytes()[..], &message, more].concat())
}

fn receive<M: for<'a> Deserialize<'a>>(stream: &UnixStream) -> io::Result<M> {
    let mut len_bytes = [0; 4];
    (&*stream).read_exact(&mut len_bytes)?;
    let message = exactly(stream, u32::from_le_bytes(len_bytes).min(LARGEST_MESSAGE).into())?;
    serde_json::from_slice(&message).map_err(io::Error::other)
}

fn exactly(stream: &UnixStream, len_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.take(len_bytes).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == len_bytes { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// The recorder's end.
pub(crate) struct Service {
    address: SocketAddr,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Service {
    /// Listens for who wants something of the calling thread, the tracer. It finds the jobs in the channel, and is woken for them.
    pub(crate) fn start(waker: Waker) -> io::Result<(Self, Receiver<Job>)> {
        let tracer = spawn::own_tid();
        let address = address(tracer)?;
        let listener = UnixListener::bind_addr(&address)?;
        let (jobs, receiver) = mpsc::channel();
        let is_over = Arc::new(AtomicBool::new(false));
        let tracer = Arc::new(TracerAt { tid: tracer, waker });
        let over = Arc::clone(&is_over);
        let listen = move || {
            for stream in listener.incoming() {
                // Relaxed: what comes next is the connection that is made after it was set.
                if over.load(Relaxed) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let (tracer, jobs) = (Arc::clone(&tracer), jobs.clone());
                let serve = move || {
                    // Who goes away in the middle is not told.
                    let _ = serve(&stream, &tracer, &jobs);
                };
                // Without a thread for it the connection is closed, and the command tries again.
                let _ = thread::Builder::new().name("trapline-patch".to_owned()).spawn(serve);
            }
        };
        let thread = thread::Builder::new().name("trapline-listen".to_owned()).spawn(listen)?;
        Ok((Self { address, is_over, thread: Some(thread) }, receiver))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.is_over.store(true, Relaxed);
        // So that it looks.
        let woken = UnixStream::connect_addr(&self.address);
        if let (Ok(_), Some(thread)) = (woken, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

/// Whom the jobs are for.
struct TracerAt {
    tid: Tid,
    waker: Waker,
}

impl TracerAt {
    /// Gives it something to do, and waits for what comes of it. Nothing does if it ends meanwhile.
    fn ask<R>(&self, jobs: &Sender<Job>, pid: Tid, what: impl FnOnce(Sender<R>) -> What) -> Option<R> {
        let (answer, answered) = mpsc::channel();
        jobs.send(Job { pid, what: what(answer) }).ok()?;
        self.waker.wake();
        answered.recv().ok()
    }
}

/// Serves one command.
fn serve(stream: &UnixStream, tracer: &TracerAt, jobs: &Sender<Job>) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let (_, user) = descriptors::peer(stream.as_raw_fd())?;
    if user != 0 && user != spawn::user() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let request = receive(stream)?;
    let patch = match &request {
        Request::Apply { patch_bytes, .. } => exactly(stream, (*patch_bytes).min(LARGEST_PATCH))?,
        _ => Vec::new(),
    };
    let client = stream.try_clone()?;
    let answer = carried_out(request, &patch, client, tracer, jobs).unwrap_or_else(Answer::from);
    send(stream, &answer, &[])
}

fn carried_out(
    request: Request,
    patch: &[u8],
    stream: UnixStream,
    tracer: &TracerAt,
    jobs: &Sender<Job>,
) -> Result<Answer, LiveError> {
    let (Request::Apply { pid, .. } | Request::Revert { pid, .. } | Request::List { pid }) = request;
    let leaves = || LiveError::RecorderLeaves { pid };
    // Before the tracer is asked: another command may have it at work for long.
    let is_to_change = !matches!(request, Request::List { .. });
    let process = Process::open_recorded(pid, tracer.tid, is_to_change)?;
    let hidden = tracer.ask(jobs, pid, What::Look).flatten().ok_or_else(leaves)?;
    let process = Process { hidden, ..process };
    let what: Box<dyn FnOnce(Client) -> What> = match request {
        Request::Apply { deadline, is_dry_run, is_forced, .. } => {
            let decoded = Patch::decode(patch).map_err(|error| {
                let source = io::Error::other(error);
                LiveError::system(pid, "reading the patch", source)
            })?;
            let coming = Coming::prepare(process, &decoded, How { deadline, is_dry_run, is_forced })?;
            Box::new(move |client| What::Come(Box::new(coming), client))
        }
        Request::Revert { name, deadline, .. } => {
            let going = Going::prepare(process, name.as_deref(), deadline)?;
            Box::new(move |client| What::Go(Box::new(going), client))
        }
        Request::List { .. } => return list_of(&process).map(Answer::Listed),
    };
    let outcome = tracer.ask(jobs, pid, move |answer| what(Client { stream, answer }));
    outcome.unwrap_or_else(|| Err(leaves())).map(|done| Answer::Done(Box::new(done)))
}

/// The command's end.
pub(super) struct Recorder {
    pid: Tid,
    stream: UnixStream,
}

impl Recorder {
    /// The recorder that traces a process, if one of ours does.
    pub(super) fn of(pid: Tid) -> Option<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let tracer: Tid = refusal::field_of(&status, "TracerPid").parse().ok().filter(|tracer| *tracer != 0)?;
        let stream = UnixStream::connect_addr(&address(tracer).ok()?).ok()?;
        // Anybody may have taken that name.
        let (listener, user) = descriptors::peer(stream.as_raw_fd()).ok()?;
        let is_it = listener == tracer && (user == spawn::user() || spawn::user() == 0);
        is_it.then_some(Self { pid, stream })
    }

    pub(super) fn apply(&self, patch: &Patch, how: How) -> Result<Done, LiveError> {
        let How { deadline, is_dry_run, is_forced } = how;
        let patch = patch.encode();
        let patch_bytes = patch.len() as u64;
        self.change(&Request::Apply { pid: self.pid, patch_bytes, deadline, is_dry_run, is_forced }, &patch, deadline)
    }

    pub(super) fn revert(&self, name: Option<&str>, deadline: Duration) -> Result<Done, LiveError> {
        self.change(&Request::Revert { pid: self.pid, name: name.map(str::to_owned), deadline }, &[], deadline)
    }

    pub(super) fn list(&self) -> Result<Vec<Listed>, LiveError> {
        match self.ask(&Request::List { pid: self.pid }, &[], Duration::ZERO)? {
            Answer::Listed(listed) => Ok(listed),
            answer => Err(self.error(answer)),
        }
    }

    fn change(&self, request: &Request, patch: &[u8], deadline: Duration) -> Result<Done, LiveError> {
        match self.ask(request, patch, deadline)? {
            Answer::Done(done) => Ok(*done),
            answer => Err(self.error(answer)),
        }
    }

    fn ask(&self, request: &Request, patch: &[u8], deadline: Duration) -> Result<Answer, LiveError> {
        // A call of a function of the patch may take as long as that, before and behind it.
        let patience = deadline.saturating_mul(4).saturating_add(PATIENCE);
        let asked = self.stream.set_read_timeout(Some(patience)).and_then(|()| send(&self.stream, request, patch));
        // A recorder that ends says nothing.
        let answer = asked.and_then(|()| receive(&self.stream));
        answer.map_err(|_| LiveError::RecorderLeaves { pid: self.pid })
    }

    fn error(&self, answer: Answer) -> LiveError {
        match answer {
            Answer::Refused(text) => LiveError::ByRecorder { text, is_failure: false },
            Answer::Failed(text) => LiveError::ByRecorder { text, is_failure: true },
            Answer::Done(_) | Answer::Listed(_) | Answer::Passes => LiveError::RecorderLeaves { pid: self.pid },
        }
    }
}
