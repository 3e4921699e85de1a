//! A client of web servers on this machine.

use std::{
    io::{Read, Write},
    net::TcpStream,
};

use crate::run;

/// The body of an answer, without what comes before it.
///
/// # Panics
/// There is no answer in time, or it is not a good one.
pub fn get(port: u16, path: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    stream.set_read_timeout(Some(run::PATIENCE)).expect("a time limit");
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").expect("a request");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").expect("headers");
    assert!(answer[..end].starts_with(b"HTTP/1.0 200 "), "{}", String::from_utf8_lossy(&answer));
    answer.split_off(end + 4)
}
