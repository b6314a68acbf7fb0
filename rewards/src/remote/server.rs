//! Any reward behind HTTP: for a model that must run on another machine than the training.

use std::convert::Infallible;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use grpo::{BoxError, Error, Prompt, Result, Reward};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use image::RgbImage;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::exchange;

/// How long a client may take for its head, and for its body.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a server says of itself, and what it lets others take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerConfig {
    /// The model's name; a run stops where it changes.
    pub model: String,
    /// The model's version; likewise.
    pub version: String,
    /// The longest request that is read.
    pub max_request_bytes: usize,
    /// The most connections at a time, and the most batches that are scored at a time; further connections wait.
    ///
    /// A client that loses patience and goes leaves its pictures to a reward that may take long, and its place with them.
    pub max_connections: usize,
}

impl ServerConfig {
    /// At most 256 MiB a request and 16 connections.
    pub fn new(model: impl Into<String>, version: impl Into<String>) -> Self {
        Self { model: model.into(), version: version.into(), max_request_bytes: 256 << 20, max_connections: 16 }
    }
}

/// The place of a connection, kept by whatever it has set to work.
type Permit = Arc<OwnedSemaphorePermit>;

/// A reward and what is said of it.
struct Service {
    reward: Box<dyn Reward<RgbImage>>,
    config: ServerConfig,
}

/// Serves `reward` at `POST /score` for as long as the process lives; returns only where it cannot.
///
/// There is no password: listen on a loopback address, and reach it from another machine through a tunnel or a proxy
/// that has one. What cannot be meant is refused by a status and a line of text: 400 a message that breaks the protocol
/// or its pictures' limits, 404 another path, 405 another method, 408 a body that does not come, 413 one too long.
pub fn serve(listener: TcpListener, reward: impl Reward<RgbImage> + 'static, config: ServerConfig) -> Result<()> {
    let failed = |error: std::io::Error| Error::config(format!("cannot serve: {error}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
        let permits = Arc::new(Semaphore::new(config.max_connections.clamp(1, Semaphore::MAX_PERMITS)));
        let service = Arc::new(Service { reward: Box::new(reward), config });
        loop {
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                return Err(Error::config("cannot serve: its connections are counted no more"));
            };
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file handles, or a client that is gone already: neither is for good.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            tokio::spawn(Arc::clone(&service).converse(stream, permit));
        }
    })
}

impl Service {
    /// Answers all requests of a connection.
    async fn converse(self: Arc<Self>, stream: TcpStream, permit: OwnedSemaphorePermit) {
        let permit = Arc::new(permit);
        let answer = service_fn(|request| {
            let (service, permit) = (Arc::clone(&self), Arc::clone(&permit));
            async move { Ok::<_, Infallible>(service.respond(request, permit).await) }
        });
        let mut http = http1::Builder::new();
        // One request each: an idle connection must not keep others from being accepted.
        http.timer(TokioTimer::new()).header_read_timeout(PATIENCE).keep_alive(false);
        // A connection that breaks is the client's to report.
        let _ = http.serve_connection(TokioIo::new(stream), answer).await;
    }

    async fn respond(self: Arc<Self>, request: Request<Incoming>, permit: Permit) -> Response<Full<Bytes>> {
        match self.answer(request, permit).await {
            Ok(answer) => response(StatusCode::OK, "application/json", answer),
            Err((status, message)) => response(status, "text/plain; charset=utf-8", message.into_bytes()),
        }
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
        permit: Permit,
    ) -> Result<Vec<u8>, (StatusCode, String)> {
        if request.uri().path() != "/score" {
            return Err((StatusCode::NOT_FOUND, "only /score is served".into()));
        }
        if request.method() != Method::POST {
            return Err((StatusCode::METHOD_NOT_ALLOWED, "send a POST".into()));
        }
        let body = tokio::time::timeout(PATIENCE, read(request.into_body(), self.config.max_request_bytes));
        let body =
            body.await.unwrap_or_else(|_| Err((StatusCode::REQUEST_TIMEOUT, "the body took too long".into())))?;
        let score = move || {
            let scored = self.score(&body);
            drop(permit);
            scored
        };
        let scored = tokio::task::spawn_blocking(score).await;
        scored.unwrap_or_else(|_| Err((StatusCode::INTERNAL_SERVER_ERROR, "the reward panicked".into())))
    }

    fn score(&self, body: &[u8]) -> Result<Vec<u8>, (StatusCode, String)> {
        let request = exchange::Request::read(body).map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?;
        let batch: Vec<(&Prompt, &RgbImage)> = request.prompts.iter().zip(&request.images).collect();
        let scores = self.reward.score_each(&batch);
        Ok(self.written(request.id, scores))
    }

    fn written(&self, id: u64, scores: Vec<Result<f32, BoxError>>) -> Vec<u8> {
        // A score that is not finite has no JSON, and needs a reason in its place.
        let finite = |score: f32| if score.is_finite() { Ok(score) } else { Err(format!("scored {score}").into()) };
        let scores: Vec<Result<f32, BoxError>> = scores.into_iter().map(|score| score.and_then(finite)).collect();
        let values: Vec<Option<&f32>> = scores.iter().map(|score| score.as_ref().ok()).collect();
        let errors: Vec<Option<String>> = scores.iter().map(|s| s.as_ref().err().map(ToString::to_string)).collect();
        let ServerConfig { model, version, .. } = &self.config;
        serde_json::json!({ "id": id, "scores": values, "errors": errors, "model": model, "version": version })
            .to_string()
            .into_bytes()
    }
}

/// The body, if it is not too long; one that is gets read to its end all the same, or the client would be cut off while
/// it writes and never see why.
async fn read(mut body: Incoming, limit: usize) -> Result<Vec<u8>, (StatusCode, String)> {
    let mut bytes = Vec::new();
    let mut n_read = 0_usize;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| (StatusCode::BAD_REQUEST, format!("the body broke off: {error}")))?;
        let Some(data) = frame.data_ref() else { continue };
        n_read = n_read.saturating_add(data.len());
        match n_read <= limit {
            true => bytes.extend_from_slice(data),
            false => bytes = Vec::new(),
        }
    }
    if n_read > limit {
        let message = format!("the request has {n_read} bytes; at most {limit}: send fewer pictures at a time");
        return Err((StatusCode::PAYLOAD_TOO_LARGE, message));
    }
    Ok(bytes)
}

fn response(status: StatusCode, content_type: &'static str, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}
