//! A server on a bare socket.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

/// A question as it came over the wire.
pub struct Asked {
    pub head: String,
    pub header: Value,
    /// Each picture's first red value, which is what the server scores by.
    pub reds: Vec<u8>,
}

impl Asked {
    pub fn scores(&self) -> Vec<Value> {
        self.reds.iter().map(|red| json!(score_of(*red))).collect()
    }

    pub fn answer(&self) -> Reply {
        Reply::ok(&json!({ "scores": self.scores(), "model": "reds", "version": 1 }))
    }
}

/// Not a whole number of tenths, so that only exact transport gives it back.
pub fn score_of(red: u8) -> f32 {
    f32::from(red) / 7.0 - 3.0
}

pub enum Reply {
    /// The status line and further headers, and the body.
    Whole(String, Vec<u8>),
    /// These bytes, and the end of the connection.
    Raw(Vec<u8>),
    /// Nothing, until the client goes.
    Hang,
}

impl Reply {
    pub fn ok(body: &Value) -> Self {
        Self::Whole("200 OK".into(), body.to_string().into_bytes())
    }

    pub fn status(status: &str, body: &str) -> Self {
        Self::Whole(status.into(), body.as_bytes().to_vec())
    }
}

fn read_request(stream: &TcpStream) -> Option<Asked> {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let length = head.to_lowercase().split("content-length: ").nth(1)?.split("\r\n").next()?.parse().ok()?;
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let line = body.iter().position(|byte| *byte == b'\n')?;
    let header: Value = serde_json::from_slice(&body[..line]).ok()?;
    let mut rest = &body[line + 1..];
    let mut reds = Vec::new();
    for n_bytes in header["images"].as_array()? {
        let (picture, behind) = rest.split_at(usize::try_from(n_bytes.as_u64()?).ok()?);
        reds.push(image::load_from_memory(picture).ok()?.to_rgb8().get_pixel(0, 0)[0]);
        rest = behind;
    }
    rest.is_empty().then_some(Asked { head, header, reds })
}

fn write_reply(mut stream: &TcpStream, reply: Reply) -> std::io::Result<()> {
    match reply {
        Reply::Whole(status, body) => {
            write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
            stream.write_all(&body)
        }
        Reply::Raw(bytes) => stream.write_all(&bytes),
        Reply::Hang => stream.read(&mut [0]).map(drop),
    }
}

/// Serves on a thread of its own for the rest of the test; `respond` is given the question and how many came before.
pub fn server(respond: impl Fn(&Asked, usize) -> Reply + Send + Sync + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/score", listener.local_addr().unwrap());
    let respond = Arc::new(respond);
    let n_asked = Arc::new(AtomicUsize::new(0));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (respond, n_asked) = (Arc::clone(&respond), Arc::clone(&n_asked));
            std::thread::spawn(move || {
                let asked = read_request(&stream)?;
                let reply = respond(&asked, n_asked.fetch_add(1, Ordering::SeqCst));
                write_reply(&stream, reply).ok()
            });
        }
    });
    url
}

/// What a server replies to a question; the number is the one of `server`, or the bad row's place in the question.
pub type Spoil = fn(&Asked, usize) -> Reply;
