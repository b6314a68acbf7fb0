//! Requests and their repetition, on a runtime that belongs to the reward.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use bytes::Bytes;
use grpo::{Error, Result, Seed};
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, LOCATION};
use hyper::{Method, Response, StatusCode, Uri, body::Incoming};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::runtime::{Builder, Runtime};

use super::HttpConfig;
use crate::exchange::{Question, excerpt};

/// The longest wait between two attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How much of an error's body is read for its first line.
const ERROR_BYTES: usize = 4096;

#[cfg(not(feature = "https"))]
type Connector = HttpConnector;
#[cfg(feature = "https")]
type Connector = hyper_rustls::HttpsConnector<HttpConnector>;

/// Posts questions to one address.
#[derive(Debug)]
pub(super) struct Client {
    /// There until the drop, which must not wait for it.
    runtime: Option<Runtime>,
    server: Arc<Server>,
}

#[derive(Debug)]
struct Server {
    pool: Pool<Connector, Full<Bytes>>,
    uri: Uri,
    authorization: Option<HeaderValue>,
    config: HttpConfig,
    n_retries: AtomicU64,
}

/// Why a question has no answer.
pub(super) struct Fault {
    pub message: String,
    /// Whether the same request may succeed later.
    passing: bool,
    /// Whether the server refused what it was asked: of fewer pictures it may say something else.
    pub refused: bool,
}

impl Client {
    pub(super) fn new(config: &HttpConfig) -> Result<Self> {
        let uri = config.checked_uri()?;
        let authorization = config.authorization()?;
        let failed = |error: &dyn std::fmt::Display| {
            Error::config(format!("reward `{}`: cannot prepare connections: {error}", config.name))
        };
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("grpo-http").enable_all().build();
        let runtime = runtime.map_err(|error| failed(&error))?;
        let pool = Pool::builder(TokioExecutor::new()).build(connector().map_err(|error| failed(&error))?);
        let server = Server { pool, uri, authorization, config: config.clone(), n_retries: AtomicU64::new(0) };
        Ok(Self { runtime: Some(runtime), server: Arc::new(server) })
    }

    pub(super) fn n_retries(&self) -> u64 {
        self.server.n_retries.load(Ordering::Relaxed)
    }

    /// The body of the answer. Waits as for a channel, so a thread of another runtime may ask.
    pub(super) fn post(&self, question: Question) -> Result<Vec<u8>, Fault> {
        let Some(runtime) = &self.runtime else { return Err(Fault::lasting("the connection is closed")) };
        let (tell, told) = sync_channel(1);
        let server = Arc::clone(&self.server);
        runtime.spawn(async move {
            // The other side waits below, unless its thread is gone.
            let _ = tell.send(server.post(question).await);
        });
        told.recv().unwrap_or_else(|_| Err(Fault::lasting("the request was dropped before its answer")))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // A plain drop would wait for name look-ups under way, and panics on a thread of another runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(not(feature = "https"))]
fn connector() -> std::io::Result<Connector> {
    Ok(plain_connector())
}

#[cfg(feature = "https")]
fn connector() -> std::io::Result<Connector> {
    let roots = hyper_rustls::HttpsConnectorBuilder::new().with_provider_and_native_roots(ring_provider())?;
    Ok(roots.https_or_http().enable_http1().wrap_connector(plain_connector()))
}

#[cfg(feature = "https")]
fn ring_provider() -> rustls::crypto::CryptoProvider {
    rustls::crypto::ring::default_provider()
}

fn plain_connector() -> HttpConnector {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector
}

impl Server {
    async fn post(&self, question: Question) -> Result<Vec<u8>, Fault> {
        // The waits are drawn from the question itself: no clock decides them, and two ranks do not wait in step.
        let header = question.body.split(|&byte| byte == b'\n').next().unwrap_or_default();
        let waits = Seed::new(0).named(&String::from_utf8_lossy(header));
        let body = Bytes::from(question.body);
        let retry = self.config.retry;
        let timeout = Duration::from_millis(self.config.limits.timeout_ms);
        let mut attempt = 0;
        loop {
            let mut fault = match tokio::time::timeout(timeout, self.attempt(body.clone())).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(fault)) => fault,
                Err(_) => Fault::passing(format!("no answer within {} ms (raise timeout_ms)", timeout.as_millis())),
            };
            if !fault.passing {
                return Err(fault);
            }
            if attempt == retry.times {
                fault.message += &format!("; gave up after {} attempts", u64::from(attempt) + 1);
                return Err(fault);
            }
            tokio::time::sleep(wait(retry.first_wait_ms, attempt, waits.fold(u64::from(attempt)).uniform())).await;
            attempt += 1;
            self.n_retries.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn attempt(&self, body: Bytes) -> Result<Vec<u8>, Fault> {
        let mut request = hyper::Request::builder()
            .method(Method::POST)
            .uri(self.uri.clone())
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(ACCEPT, "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization.clone());
        }
        let request = request.body(Full::new(body)).map_err(|error| Fault::lasting(error.to_string()))?;
        let response = self.pool.request(request).await.map_err(|error| Fault::passing(with_causes(&error)))?;
        if response.status() == StatusCode::OK { self.answer(response).await } else { Err(refusal(response).await) }
    }

    async fn answer(&self, response: Response<Incoming>) -> Result<Vec<u8>, Fault> {
        let limit = self.config.limits.max_response_bytes;
        match Limited::new(response.into_body(), limit).collect().await {
            Ok(body) => Ok(body.to_bytes().into()),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => {
                Err(Fault::refused(format!("its answer has more than {limit} bytes (max_response_bytes)")))
            }
            Err(error) => Err(Fault::passing(format!("its answer broke off: {}", with_causes(error.as_ref())))),
        }
    }
}

/// What a status other than 200 means, in the server's own words where it has some.
async fn refusal(response: Response<Incoming>) -> Fault {
    let status = response.status();
    if status.is_redirection() {
        let target = response.headers().get(LOCATION).map_or(Default::default(), |to| excerpt(to.as_bytes()));
        return Fault::lasting(format!("redirects to `{target}` ({status}), which is not followed; put it into `url`"));
    }
    let body = Limited::new(response.into_body(), ERROR_BYTES).collect().await;
    let said = body.map_or(String::new(), |body| excerpt(&body.to_bytes()));
    let message = if said.is_empty() { format!("status {status}") } else { format!("status {status}: {said}") };
    let later = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS].contains(&status);
    // A server with too much to do is not helped by more requests.
    let busy = [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].contains(&status);
    Fault { message, passing: status.is_server_error() || later, refused: !busy }
}

impl Fault {
    fn passing(message: String) -> Self {
        Self { message, passing: true, refused: false }
    }

    fn lasting(message: impl Into<String>) -> Self {
        Self { message: message.into(), passing: false, refused: false }
    }

    pub(super) fn refused(message: String) -> Self {
        Self { message, passing: false, refused: true }
    }
}

/// From half of the exponential wait to all of it; `draw` is in `[0, 1)`.
fn wait(first_wait_ms: u64, attempt: u32, draw: f64) -> Duration {
    let full = Duration::from_millis(first_wait_ms).saturating_mul(1_u32.checked_shl(attempt).unwrap_or(u32::MAX));
    full.min(LONGEST_WAIT).mul_f64(0.5 + 0.5 * draw)
}

/// hyper's errors say little themselves; the operating system's words are among their causes.
fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_within_their_bounds() {
        let ms = |attempt, draw| wait(200, attempt, draw).as_millis();
        assert_eq!([ms(0, 0.0), ms(0, 1.0), ms(1, 0.0), ms(2, 1.0)], [100, 200, 200, 800]);
        assert_eq!([ms(31, 1.0), ms(400, 1.0)], [30_000, 30_000]);
        assert_eq!(wait(u64::MAX, u32::MAX, 0.0), LONGEST_WAIT / 2);
    }
}
