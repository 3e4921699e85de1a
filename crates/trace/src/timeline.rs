//! The events of all threads in the order of time, whatever the order of their chunks in the file; or of one thread after the other.
//!
//! Owns the [`Timeline`] and the [`Order`] of its events. It goes through the file once to find out where the chunks of each stream are, and then reads each one when its first event is due.
//! Events of a stream stay in their own order: contexts that interrupt each other have times a little out of order. Invariant: memory holds the chunks
//! of streams that are between two events of a chunk, and 32 bytes for each chunk of the file, never more of the events.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, VecDeque},
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{Catalog, Damage, Decoder, Error, EventsChunk, Reader, TimedEvent, format::HEAD_BYTES};

/// Whose events come next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// The earliest of all threads' ones.
    Time,
    /// Those of the same thread, to its end. Threads come in the order of the recorder's numbers. One chunk is held at a time.
    Stream,
}

/// See the module's text.
#[derive(Debug)]
pub struct Timeline {
    order: Order,
    path: PathBuf,
    file: File,
    cursors: Vec<Cursor>,
    /// When the next event of each stream is due, the earliest first; 0 where the order is not that of time.
    due: BinaryHeap<Reverse<(u64, usize)>>,
    decoder: Decoder,
    payload: Vec<u8>,
    /// The stream whose chunk was given to its end.
    done: Option<usize>,
    /// Memory for events that no stream uses.
    spare: Vec<TimedEvent>,
    senseless_chunks: u64,
    records: u64,
}

/// Where a stream is.
#[derive(Debug)]
struct Cursor {
    stream: u32,
    places: VecDeque<Place>,
    chunk: Option<EventsChunk>,
    events: Vec<TimedEvent>,
    /// How many of the events were given.
    given: usize,
}

/// Where a chunk is in the file.
#[derive(Debug)]
struct Place {
    payload_at: u64,
    payload_len: u32,
    follows_gap: bool,
    first_tsc: u64,
    records: u32,
}

/// Some events of one stream in a row, before which no other stream has any that were not given.
#[derive(Debug)]
pub struct Part<'a> {
    /// The stream.
    pub stream: u32,
    /// The chunk that begins here.
    pub starts: Option<&'a EventsChunk>,
    /// None if the chunk makes no sense.
    pub events: &'a [TimedEvent],
    /// What comes next in this chunk, after events of other streams.
    pub next: Option<TimedEvent>,
    /// The stream has no more events.
    pub is_last: bool,
}

impl Order {
    /// When a stream's turn is whose next event has this time. Of streams with the same, the first one's is.
    fn due(self, tsc: u64) -> u64 {
        match self {
            Self::Time => tsc,
            Self::Stream => 0,
        }
    }
}

impl Timeline {
    /// Goes through a trace. The timeline will have the streams that `is_wanted`.
    ///
    /// # Errors
    /// Those of [`Reader::open`] and [`Reader::next_chunk`].
    pub fn open(
        path: &Path,
        order: Order,
        is_wanted: impl Fn(&Catalog, u32) -> bool,
    ) -> Result<(Self, Catalog, Damage), Error> {
        let mut reader = Reader::open(path)?;
        let mut catalog = Catalog::new();
        let mut places: BTreeMap<u32, VecDeque<Place>> = BTreeMap::new();
        while let Some(chunk) = reader.next_chunk()? {
            let Some(chunk) = catalog.take(chunk) else { continue };
            let payload_len = chunk.len_bytes - HEAD_BYTES;
            places.entry(chunk.stream).or_default().push_back(Place {
                payload_at: reader.offset() - payload_len as u64,
                payload_len: u32::try_from(payload_len).unwrap_or(u32::MAX),
                follows_gap: chunk.follows_gap,
                first_tsc: chunk.first_tsc,
                records: chunk.records,
            });
        }
        let file = File::open(path).map_err(|source| Error::Open { path: path.into(), source })?;
        let wanted = places.into_iter().filter(|(stream, _)| is_wanted(&catalog, *stream));
        let cursors: Vec<Cursor> = wanted
            .map(|(stream, places)| Cursor { stream, places, chunk: None, events: Vec::new(), given: 0 })
            .collect();
        let first =
            |(index, cursor): (usize, &Cursor)| Some(Reverse((order.due(cursor.places.front()?.first_tsc), index)));
        let due = cursors.iter().enumerate().filter_map(first).collect();
        let places = cursors.iter().flat_map(|cursor| &cursor.places);
        let records = places.map(|place| u64::from(place.records)).sum();
        let timeline = Self {
            order,
            path: path.into(),
            file,
            cursors,
            due,
            decoder: Decoder::new(),
            payload: Vec::new(),
            done: None,
            spare: Vec::new(),
            senseless_chunks: 0,
            records,
        };
        Ok((timeline, catalog, reader.damage().clone()))
    }

    /// Chunks so far whose checksums are right, and whose events make no sense.
    pub fn senseless_chunks(&self) -> u64 {
        self.senseless_chunks
    }

    /// How many events there are in all, as the chunks' headers say.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// The next events, or `None` at the end.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn next_part(&mut self) -> Result<Option<Part<'_>>, Error> {
        if let Some(done) = self.done.take() {
            self.spare = std::mem::take(&mut self.cursors[done].events);
            self.cursors[done].given = 0;
        }
        let Some(Reverse((_, index))) = self.due.pop() else { return Ok(None) };
        let is_start = self.cursors[index].events.is_empty();
        if is_start {
            self.load(index)?;
        }
        let until = match self.order {
            Order::Time => self.due.peek().map_or(u64::MAX, |Reverse((tsc, _))| *tsc),
            Order::Stream => u64::MAX,
        };
        let cursor = &mut self.cursors[index];
        let begin = cursor.given;
        // The first one is due in any case.
        let others = cursor.events.iter().skip(begin + 1).take_while(|event| event.tsc <= until).count();
        cursor.given = cursor.events.len().min(begin + 1 + others);
        let next = cursor.events.get(cursor.given).copied();
        let due = next.map(|event| event.tsc).or_else(|| Some(cursor.places.front()?.first_tsc));
        self.due.extend(due.map(|tsc| Reverse((self.order.due(tsc), index))));
        self.done = next.is_none().then_some(index);
        let cursor = &self.cursors[index];
        Ok(Some(Part {
            stream: cursor.stream,
            starts: cursor.chunk.as_ref().filter(|_| is_start),
            events: &cursor.events[begin..cursor.given],
            next,
            is_last: due.is_none(),
        }))
    }

    /// Reads and decodes a stream's next chunk.
    fn load(&mut self, index: usize) -> Result<(), Error> {
        let cursor = &mut self.cursors[index];
        let Some(place) = cursor.places.pop_front() else { return Ok(()) };
        self.payload.resize(place.payload_len as usize, 0);
        let read = self.file.read_exact_at(&mut self.payload, place.payload_at);
        read.map_err(|source| Error::Read { path: self.path.clone(), source })?;
        let mut events = std::mem::take(&mut self.spare);
        cursor.chunk = EventsChunk::parse(&self.payload).ok().filter(|chunk| chunk.stream == cursor.stream);
        if let Some(chunk) = &mut cursor.chunk {
            chunk.follows_gap = place.follows_gap;
        }
        let is_sound = cursor.chunk.as_ref().is_some_and(|chunk| self.decoder.decode(chunk, &mut events).is_ok());
        if !is_sound {
            events.clear();
            self.senseless_chunks += 1;
        }
        (cursor.events, cursor.given) = (events, 0);
        Ok(())
    }
}
