//! The Common Trace Format, version 1.8: a stream of events a thread, and a text that describes them.
//!
//! Owns [`Ctf`]. Functions are an enumeration, so that readers print names and files hold numbers. Invariant: `metadata` comes last, so that a directory without it is an export that
//! was not finished; each name in it stands for one function.

use std::{
    collections::HashSet,
    fmt::Write as _,
    fs::File,
    io::{self, BufWriter, Write},
    path::PathBuf,
};

use crate::{
    source::{Call, Enter, Function, Output, Thread, Trace},
    target::create,
};

const MAGIC: u32 = 0xc1fc_1fc1;

/// Events, as [`HEAD`] numbers them.
const ENTRY: u8 = 0;
const EXIT: u8 = 1;
const POINT: u8 = 2;

/// What is the same in all traces. A file is one packet.
const HEAD: &str = r"/* CTF 1.8 */
typealias integer { size = 8; align = 8; signed = false; } := uint8_t;
typealias integer { size = 32; align = 8; signed = false; } := uint32_t;
trace {
	major = 1;
	minor = 8;
	byte_order = le;
	packet.header := struct { uint32_t magic; };
};
";

/// See the module's text.
pub(crate) struct Ctf {
    directory: PathBuf,
    stream: Option<BufWriter<File>>,
}

impl Ctf {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory, stream: None }
    }

    fn event(&mut self, kind: u8, function: u32, ns: u64) -> io::Result<()> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        stream.write_all(&[kind])?;
        stream.write_all(&ns.to_le_bytes())?;
        stream.write_all(&function.to_le_bytes())
    }
}

/// The names of functions, of which no two are the same.
fn unique(functions: &[Function]) -> Vec<String> {
    let mut taken = HashSet::new();
    let mut name = |function: &Function| {
        let (name, module, address) = (&function.name, function.module(), function.address);
        let tried = [name.clone(), format!("{name} [{module}]"), format!("{name} [{module}+{address:#x}]")];
        let free = tried.into_iter().find(|name| taken.insert(name.clone()));
        free.unwrap_or_else(|| {
            let name = format!("{name} #{}", taken.len());
            taken.insert(name.clone());
            name
        })
    };
    functions.iter().map(&mut name).collect()
}

/// A string as the description's language has it.
fn quoted(text: &str) -> String {
    let escaped = text.chars().map(|sign| match sign {
        '"' | '\\' => format!("\\{sign}"),
        sign if sign.is_control() => " ".to_owned(),
        sign => sign.to_string(),
    });
    format!("\"{}\"", escaped.collect::<String>())
}

fn metadata(trace: &Trace) -> String {
    let meta = trace.catalog.meta.clone().unwrap_or_default();
    let mut text = HEAD.to_owned();
    let _ = writeln!(
        text,
        "env {{\n\thostname = {};\n\tsysname = {};\n\ttracer_name = \"trapline\";\n\tcommand = {};\n}};",
        quoted(&meta.host),
        quoted(&meta.kernel),
        quoted(&meta.command.join(" "))
    );
    let (seconds, ns) = (meta.started_unix_ns / 1_000_000_000, meta.started_unix_ns % 1_000_000_000);
    let _ = writeln!(
        text,
        "clock {{\n\tname = trapline;\n\tfreq = 1000000000;\n\toffset_s = {seconds};\n\toffset = {ns};\n}};"
    );
    text += "typealias integer { size = 64; align = 8; signed = false; map = clock.trapline.value; } := time_t;\n";
    text += "typealias enum : uint32_t {\n";
    for (number, name) in unique(&trace.functions).iter().enumerate() {
        let _ = writeln!(text, "\t{} = {number},", quoted(name));
    }
    text += "} := function_t;\n";
    text += "stream {\n\tpacket.context := struct { uint32_t pid; uint32_t tid; string program; string thread; };\n";
    text += "\tevent.header := struct { uint8_t id; time_t timestamp; };\n};\n";
    for (id, name) in [(ENTRY, "entry"), (EXIT, "exit"), (POINT, "point")] {
        let _ = writeln!(
            text,
            "event {{\n\tname = \"{name}\";\n\tid = {id};\n\tfields := struct {{ function_t function; }};\n}};"
        );
    }
    text
}

impl Output for Ctf {
    fn thread(&mut self, _: &Trace, thread: &Thread) -> io::Result<()> {
        let mut stream =
            BufWriter::with_capacity(1 << 16, create(&self.directory.join(format!("stream-{}", thread.stream)))?);
        stream.write_all(&MAGIC.to_le_bytes())?;
        stream.write_all(&thread.pid.to_le_bytes())?;
        stream.write_all(&thread.tid.to_le_bytes())?;
        for name in [thread.program(), &thread.name] {
            stream.write_all(name.replace('\0', " ").as_bytes())?;
            stream.write_all(b"\0")?;
        }
        self.stream = Some(stream);
        Ok(())
    }

    fn enter(&mut self, _: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.event(ENTRY, enter.function, enter.start_ns)
    }

    fn leave(&mut self, _: &Trace, _: &Thread, call: Call) -> io::Result<()> {
        self.event(EXIT, call.function, call.end_ns)
    }

    fn point(&mut self, _: &Trace, _: &Thread, enter: Enter) -> io::Result<()> {
        self.event(POINT, enter.function, enter.start_ns)
    }

    fn thread_end(&mut self, _: &Trace, _: &Thread) -> io::Result<()> {
        self.stream.take().map_or(Ok(()), |mut stream| stream.flush())
    }

    fn end(self, trace: &Trace) -> io::Result<()> {
        create(&self.directory.join("metadata"))?.write_all(metadata(trace).as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_functions_have_the_same_name() {
        let function =
            |name: &str, path: &str, address| Function { site: 0, name: name.into(), path: path.into(), address };
        let functions = [
            function("f", "/a", 1),
            function("f", "/b", 1),
            function("f", "/b", 2),
            function("f", "/b", 2),
            function("g", "/a", 3),
        ];
        assert_eq!(unique(&functions), ["f", "f [b]", "f [b+0x2]", "f #3", "g"]);
    }

    #[test]
    fn what_would_end_a_string_does_not() {
        assert_eq!(quoted("a\"b\\c\nd"), r#""a\"b\\c d""#);
    }
}
