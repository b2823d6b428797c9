//! The driver API as programs see it: the library loaded as `libcuda.so.1`, each test in a
//! process of its own.

mod addresses;
mod capture;
mod cuda;
mod faults;
mod graphs;
mod handles;
mod images;
mod memory;
mod modules;
mod programs;
mod random;
mod report;
mod reset;
mod rest;
mod symbols;
