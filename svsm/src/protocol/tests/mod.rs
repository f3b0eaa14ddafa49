//! The calls as a guest makes them, on a model of the rest of the paravisor.
//!
//! Each file is about one kind of call: good ones, each bad input with its exact code and `next`,
//! and proof that a refused call has changed nothing.

mod model;
mod world;

mod attestation;
mod calls;
mod histories;
mod pvalidate;
mod races;
mod turnstile;
mod vcpu;
