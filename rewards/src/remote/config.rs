//! Which server judges, and what it may take: every check that needs no connection.

use std::num::NonZeroUsize;

use grpo::{Error, Result};
use hyper::Uri;
use hyper::header::HeaderValue;
use serde::{Deserialize, Serialize};

use crate::exchange::Encoding;

/// A reward behind HTTP.
///
/// ```toml
/// name = "hps"
/// url = "http://127.0.0.1:8000/score"
/// limits = { images_per_request = 8 }
/// token_env = "SCORER_TOKEN"
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    /// The reward's name in logs and panels.
    pub name: String,
    /// Where questions are posted; `https` needs the feature of that name.
    pub url: String,
    /// What requests may take.
    #[serde(default)]
    pub limits: HttpLimits,
    /// How often a request is sent again.
    #[serde(default)]
    pub retry: Retry,
    /// How pictures travel.
    #[serde(default)]
    pub encoding: Encoding,
    /// The environment variable that holds a bearer token; none is sent where absent.
    ///
    /// Over plain `http` anyone between here and the server can read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_env: Option<String>,
    /// Whether the server may be on another machine than this one.
    #[serde(default)]
    pub allow_remote: bool,
}

/// What requests may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpLimits {
    /// The most pictures of one request; fewer where they are large (see [`exchange`](crate::exchange)).
    pub images_per_request: NonZeroUsize,
    /// The most requests under way at a time, whatever the number of threads that ask.
    pub max_in_flight: NonZeroUsize,
    /// How long one attempt is waited for, from connecting to the last byte of the answer.
    pub timeout_ms: u64,
    /// The longest answer that is read.
    pub max_response_bytes: usize,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self {
            images_per_request: NonZeroUsize::MIN.saturating_add(15),
            max_in_flight: NonZeroUsize::MIN.saturating_add(3),
            timeout_ms: 60_000,
            max_response_bytes: 1 << 20,
        }
    }
}

/// How often a request is sent again, and after how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Retry {
    /// Attempts after the first.
    pub times: u32,
    /// The longest wait before the second attempt; each later one may wait twice as long, at most half a minute.
    pub first_wait_ms: u64,
}

impl Default for Retry {
    fn default() -> Self {
        Self { times: 3, first_wait_ms: 200 }
    }
}

impl HttpConfig {
    /// A server with every other setting as documented.
    pub fn new(name: impl Into<String>, url: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            url: url.into(),
            limits: HttpLimits::default(),
            retry: Retry::default(),
            encoding: Encoding::default(),
            token_env: None,
            allow_remote: false,
        }
    }

    /// The address, where all settings can be meant.
    pub(super) fn checked_uri(&self) -> Result<Uri> {
        let fault = |message: String| Err(Error::config(format!("reward `{}`: {message}", self.name)));
        if self.name.is_empty() {
            return fault("its name is empty; give one".into());
        }
        if let Encoding::Jpeg { quality } = self.encoding
            && !(1..=100).contains(&quality)
        {
            return fault(format!("encoding.jpeg.quality is {quality}; give 1 to 100"));
        }
        if self.limits.timeout_ms == 0 || self.limits.max_response_bytes == 0 {
            let HttpLimits { timeout_ms, max_response_bytes, .. } = self.limits;
            return fault(format!(
                "timeout_ms is {timeout_ms}, max_response_bytes {max_response_bytes}; give at least 1"
            ));
        }
        let uri: Uri = match self.url.parse() {
            Ok(uri) => uri,
            Err(error) => return fault(format!("url is `{}`: {error}; give one like {EXAMPLE}", self.url)),
        };
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return fault(format!("url is `{}`, without a scheme or a host; give one like {EXAMPLE}", self.url));
        };
        if authority.as_str().contains('@') {
            return fault("url holds a user's name or password; use token_env, the name of a variable".into());
        }
        match scheme {
            "http" => {}
            "https" if cfg!(feature = "https") => {}
            "https" => return fault(format!("url is `{}`; build with --features https", self.url)),
            other => return fault(format!("url has the scheme `{other}`; give http or https")),
        }
        if !self.allow_remote && !is_loopback(authority.host()) {
            return fault(format!(
                "url names the host `{}`, another machine, which would see all pictures and decide the reward; set \
                 allow_remote = true if it may",
                authority.host()
            ));
        }
        Ok(uri)
    }

    /// The header of the token that the environment holds; the token itself is in no message.
    pub(super) fn authorization(&self) -> Result<Option<HeaderValue>> {
        let Some(variable) = &self.token_env else { return Ok(None) };
        let token = std::env::var(variable).unwrap_or_default();
        let header = HeaderValue::from_str(&format!("Bearer {}", token.trim()));
        match header {
            Ok(mut header) if !token.trim().is_empty() => {
                header.set_sensitive(true);
                Ok(Some(header))
            }
            _ => Err(Error::config(format!(
                "reward `{}`: token_env names {variable}, which is unset, empty or no header's text; set it, or leave \
                 token_env out",
                self.name
            ))),
        }
    }
}

const EXAMPLE: &str = "http://127.0.0.1:8000/score";

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    let named = host.eq_ignore_ascii_case("localhost");
    named || address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(change: impl FnOnce(&mut HttpConfig)) -> String {
        let mut config = HttpConfig::new("far", EXAMPLE);
        change(&mut config);
        let refused = config.checked_uri().and_then(|_| config.authorization());
        refused.map_or_else(|error| error.to_string(), |_| String::new())
    }

    #[test]
    fn only_this_machine_unless_it_is_said() {
        for host in ["127.0.0.1:1", "127.9.9.9", "[::1]:80", "localhost", "LOCALHOST:8000"] {
            assert_eq!(message(|config| config.url = format!("http://{host}/score")), "", "{host}");
        }
        for host in ["10.0.0.1", "scorer.example:8000", "localhost.example", "127.0.0.1.example", "[::2]", "0.0.0.0"] {
            let url = format!("http://{host}/score");
            let refused = message(|config| config.url.clone_from(&url));
            assert!(refused.contains("another machine") && refused.contains("allow_remote = true"), "{refused}");
            assert_eq!(message(|config| (config.url, config.allow_remote) = (url, true)), "", "{host}");
        }
    }

    #[test]
    fn settings_that_cannot_be_meant_are_refused() {
        let url = |url: &'static str| message(move |config| config.url = url.into());
        assert!(url("127.0.0.1:8000").contains("without a scheme"), "{}", url("127.0.0.1:8000"));
        assert!(url("/score").contains("without a scheme or a host"));
        assert!(url("http://a b/").contains("give one like http://127.0.0.1:8000/score"));
        assert!(url("ftp://127.0.0.1/").contains("scheme `ftp`"));
        let secret = url("http://me:hunter2@127.0.0.1/");
        assert!(secret.contains("token_env") && !secret.contains("hunter2"), "{secret}");
        #[cfg(not(feature = "https"))]
        assert!(url("https://127.0.0.1/").contains("build with --features https"));
        let quality = message(|config| config.encoding = Encoding::Jpeg { quality: 0 });
        assert!(quality.contains("quality is 0; give 1 to 100"), "{quality}");
        assert!(message(|config| config.limits.timeout_ms = 0).contains("timeout_ms is 0"));
        assert!(message(|config| config.name.clear()).contains("name is empty"));
        let unset = message(|config| config.token_env = Some("GRPO_TEST_NO_SUCH_VARIABLE".into()));
        assert!(unset.contains("GRPO_TEST_NO_SUCH_VARIABLE, which is unset"), "{unset}");
    }

    #[test]
    fn a_table_of_two_keys_is_enough_and_a_misspelt_one_is_refused() {
        let parse = |text: &str| serde_json::from_str::<HttpConfig>(text);
        let short = parse(r#"{"name":"far","url":"http://127.0.0.1:8000/score"}"#).unwrap();
        assert_eq!(short, HttpConfig::new("far", EXAMPLE));
        let long = r#"{"name":"far","url":"x","limits":{"timeout_ms":5},"encoding":{"jpeg":{"quality":90}}}"#;
        let long = parse(long).unwrap();
        assert_eq!((long.limits.timeout_ms, long.limits.max_in_flight.get()), (5, 4));
        assert_eq!(long.encoding, Encoding::Jpeg { quality: 90 });
        let error = parse(r#"{"name":"far","url":"x","limits":{"timeout":5}}"#).unwrap_err().to_string();
        assert!(error.contains("unknown field `timeout`"), "{error}");
    }
}
