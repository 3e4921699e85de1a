//! An HTTP server with four threads: `/N` is answered by the N-th triangular number. Writes its port to the file `port`.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    thread,
};

#[inline(never)]
fn triangular(number: u64) -> u64 {
    if number == 0 { 0 } else { number + triangular(number - 1) }
}

#[inline(never)]
fn path_of(stream: &TcpStream) -> Option<u64> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next()?.ok()?;
    // The headers up to the empty line.
    lines.find(|line| line.as_ref().is_ok_and(String::is_empty))?.ok()?;
    request.split(' ').nth(1)?.strip_prefix('/')?.parse().ok()
}

#[inline(never)]
fn answer(mut stream: TcpStream) {
    let body = path_of(&stream).map_or_else(|| "?".to_owned(), |number| triangular(number).to_string());
    let _ = write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
}

fn main() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let listener = listener.try_clone().expect("a descriptor");
            thread::spawn(move || listener.incoming().flatten().for_each(answer))
        })
        .collect();
    let port = listener.local_addr().expect("an address").port();
    fs::write("port.new", port.to_string()).expect("a file");
    fs::rename("port.new", "port").expect("a file");
    for thread in threads {
        thread.join().expect("a thread");
    }
}
