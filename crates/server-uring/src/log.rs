//! The log: where it goes, and how many lines.
//!
//! What a peer does can have a line: it comes, is refused, damages a batch, has a slow request. So
//! lines from one place of the code are bounded, in the parent and in the worker alike: who floods
//! the log would have shards wait for whoever reads it, and hide what others do. What was left out
//! is counted, and told with the next line of any kind, once a second at most. What is only logged
//! when somebody asks for it (debug, trace) is not bounded.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt};

use crate::config::{Config, LogFormat};

/// Lines from one place that may come at once: hundreds of guests that find a new daemon.
const BURST: u32 = 400;
/// How long such a place takes for one more.
const LINE_EVERY: Duration = Duration::from_millis(50);
/// How often it is told what was left out.
const TOLD_EVERY: Duration = Duration::from_secs(1);
/// The target of the lines that tell it.
const NOT_TOLD: &str = "ringfs_server::log::not_told";

/// Starts it, to stderr.
pub fn start(config: &Config) {
    let filter = config.log.as_ref().and_then(|log| EnvFilter::try_new(log).ok());
    let filter = filter.or_else(|| EnvFilter::try_from_default_env().ok());
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    let lines = match config.log_format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(filter.unwrap_or_else(|| "info".into()))
        .with(lines)
        .with(Bounded::default())
        .init();
}

/// Lines from one place.
struct Place {
    /// Where, as people look for it.
    file: &'static str,
    line: u32,
    level: Level,
    /// When all that it wrote is paid for.
    paid_at: Instant,
    left_out: u64,
}

impl Place {
    fn takes(&mut self, now: Instant) -> bool {
        let paid_at = self.paid_at.max(now) + LINE_EVERY;
        let fits = paid_at <= now + LINE_EVERY * BURST;
        if fits {
            self.paid_at = paid_at;
        } else {
            self.left_out += 1;
        }
        fits
    }
}

#[derive(Default)]
struct Places {
    by_callsite: HashMap<Identifier, Place>,
    /// When to tell what was left out, if anything was.
    tell_at: Option<Instant>,
}

/// So many lines were left out.
#[derive(Debug, PartialEq, Eq)]
struct LeftOut {
    file: &'static str,
    line: u32,
    level: Level,
    lines: u64,
}

impl Places {
    /// Whether a line has room, and what is to be told before it.
    fn line(&mut self, of: &Metadata<'static>, now: Instant) -> (bool, Vec<LeftOut>) {
        let place = self.by_callsite.entry(of.callsite()).or_insert_with(|| Place {
            file: of.file().unwrap_or_default(),
            line: of.line().unwrap_or_default(),
            level: *of.level(),
            paid_at: now,
            left_out: 0,
        });
        let fits = place.takes(now);
        if !fits {
            self.tell_at.get_or_insert(now + TOLD_EVERY);
        }
        let is_due = self.tell_at.is_some_and(|at| at <= now);
        (fits, if is_due { self.left_out() } else { Vec::new() })
    }

    fn left_out(&mut self) -> Vec<LeftOut> {
        self.tell_at = None;
        let places = self.by_callsite.values_mut().filter(|place| place.left_out > 0);
        places
            .map(|place| {
                let Place { file, line, level, .. } = *place;
                LeftOut { file, line, level, lines: std::mem::take(&mut place.left_out) }
            })
            .collect()
    }
}

/// The layer that bounds the others.
#[derive(Default)]
struct Bounded(Mutex<Places>);

impl<S: Subscriber> Layer<S> for Bounded {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO || metadata.target() == NOT_TOLD {
            return true;
        }
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (fits, left_out) = places.line(metadata, Instant::now());
        drop(places);
        for LeftOut { file, line, level, lines } in left_out {
            tracing::warn!(
                target: NOT_TOLD,
                not_told = lines,
                from = format_args!("{file}:{line}"),
                of_level = %level,
                "lines were left out of the log"
            );
        }
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Nothing;

    impl tracing::Callsite for Nothing {
        fn set_interest(&self, _: tracing::subscriber::Interest) {}
        fn metadata(&self) -> &Metadata<'_> {
            unreachable!("nobody asks")
        }
    }

    fn metadata(line: u32, callsite: &'static Nothing) -> Metadata<'static> {
        let fields = tracing::field::FieldSet::new(&[], Identifier(callsite));
        let kind = tracing::metadata::Kind::EVENT;
        Metadata::new("a", "t", Level::WARN, Some("f"), Some(line), None, fields, kind)
    }

    #[test]
    fn a_flood_from_one_place_is_bounded_and_counted() {
        // Statics without a size may have one address.
        static FLOOD: (Nothing, u8) = (Nothing, 1);
        static OTHER: (Nothing, u8) = (Nothing, 2);
        let (flood, other) = (metadata(1, &FLOOD.0), metadata(2, &OTHER.0));
        let (mut places, begun) = (Places::default(), Instant::now());
        let mut written = 0;
        for _ in 0..10_000 {
            let (fits, told) = places.line(&flood, begun);
            written += u32::from(fits);
            assert!(told.is_empty());
        }
        assert_eq!(written, BURST);
        assert_eq!(places.line(&other, begun), (true, Vec::new()), "another place has its own");
        let later = begun + TOLD_EVERY;
        let left = |lines| LeftOut { file: "f", line: 1, level: Level::WARN, lines };
        assert_eq!(places.line(&other, later), (true, vec![left(10_000 - u64::from(BURST))]));
        let refilled = (0..100).filter(|_| places.line(&flood, later).0).count();
        assert_eq!(refilled as u32, TOLD_EVERY.div_duration_f32(LINE_EVERY) as u32);
        // A place that is quiet for long has all of it again, and nothing more.
        let much_later = later + LINE_EVERY * BURST * 3;
        let again = (0..BURST + 100).filter(|_| places.line(&flood, much_later).0).count();
        assert_eq!(again as u32, BURST);
    }
}
