//! Shapes: a world small enough to learn in minutes, judged by GenEval's own rules.
//!
//! A [`Scene`] is one to four flat shapes on grey; it can be drawn ([`render`]), told ([`captions`]), asked for
//! ([`train_prompts`], [`held_out_prompts`], in GenEval's metadata format with its six tasks) and found again in a
//! picture ([`ShapesDetector`]). So the whole path of a text-to-image experiment runs without a download:
//!
//! ```
//! use grpo::{Reward, Seed};
//! use grpo_rewards::geneval::GenEval;
//! use grpo_rewards::shapes::{DEFAULT_SIDE, ShapesDetector, held_out_prompts, render, scene_for};
//!
//! let judge = GenEval::new(ShapesDetector::new());
//! let metadata = held_out_prompts().swap_remove(20);
//! let picture = render(&scene_for(&metadata, Seed::new(0))?, DEFAULT_SIDE);
//! assert_eq!(judge.score(&metadata.to_prompt()?, &picture)?, 1.0);
//! # Ok::<(), grpo::BoxError>(())
//! ```
//!
//! What is held out is a combination, never a word: see [`held_out_prompts`].

mod corpus;
mod detector;
mod fit;
mod geometry;
mod negatives;
mod pixels;
mod prompts;
mod render;
mod scene;
mod split;
mod statement;

use std::fmt;

use serde::{Deserialize, Serialize};

pub use corpus::{Split, write_corpus};
pub use detector::ShapesDetector;
pub use prompts::{Example, example, held_out_prompts, train_prompts, training_example};
pub use render::{BACKGROUND, DEFAULT_SIDE, render};
pub use scene::{Object, Scene, random_scene, scene_for};
pub use statement::{Captions, captions, vocabulary};

/// The six shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// A disc.
    Circle,
    /// An upright square.
    Square,
    /// A triangle on its base.
    Triangle,
    /// A five-pointed star on two points.
    Star,
    /// A plus sign.
    Cross,
    /// A disc with a hole.
    Ring,
}

impl Class {
    /// All six.
    pub const ALL: [Self; 6] = [Self::Circle, Self::Square, Self::Triangle, Self::Star, Self::Cross, Self::Ring];

    /// The word in metadata and captions.
    pub fn name(self) -> &'static str {
        match self {
            Self::Circle => "circle",
            Self::Square => "square",
            Self::Triangle => "triangle",
            Self::Star => "star",
            Self::Cross => "cross",
            Self::Ring => "ring",
        }
    }

    /// The word for several.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Circle => "circles",
            Self::Square => "squares",
            Self::Triangle => "triangles",
            Self::Star => "stars",
            Self::Cross => "crosses",
            Self::Ring => "rings",
        }
    }

    /// The class of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|class| class.name() == name)
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// GenEval's ten colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Color {
    /// Red.
    Red,
    /// Orange.
    Orange,
    /// Yellow.
    Yellow,
    /// Green.
    Green,
    /// Blue.
    Blue,
    /// Purple.
    Purple,
    /// Pink.
    Pink,
    /// Brown.
    Brown,
    /// Black.
    Black,
    /// White.
    White,
}

impl Color {
    /// All ten, in GenEval's order.
    pub const ALL: [Self; 10] = [
        Self::Red,
        Self::Orange,
        Self::Yellow,
        Self::Green,
        Self::Blue,
        Self::Purple,
        Self::Pink,
        Self::Brown,
        Self::Black,
        Self::White,
    ];

    /// The word in metadata and captions.
    pub fn name(self) -> &'static str {
        match self {
            Self::Red => "red",
            Self::Orange => "orange",
            Self::Yellow => "yellow",
            Self::Green => "green",
            Self::Blue => "blue",
            Self::Purple => "purple",
            Self::Pink => "pink",
            Self::Brown => "brown",
            Self::Black => "black",
            Self::White => "white",
        }
    }

    /// The pixels it is drawn with.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::Red => [220, 25, 30],
            Self::Orange => [255, 140, 0],
            Self::Yellow => [255, 230, 30],
            Self::Green => [25, 150, 50],
            Self::Blue => [25, 70, 225],
            Self::Purple => [125, 30, 170],
            Self::Pink => [255, 130, 200],
            Self::Brown => [115, 65, 20],
            Self::Black => [10, 10, 10],
            Self::White => [255, 255, 255],
        }
    }

    /// The colour of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|color| color.name() == name)
    }
}

impl fmt::Display for Color {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
