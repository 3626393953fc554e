//! JSON from plain Python values (exact types, within their bounds), in canonical order.
use dotmac_core::audit::canonical;
use dotmac_core::audit::event::{MAX_DEPTH, MAX_JSON};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple, PyType};

/// Integers up to here are exact as doubles, so that RFC 8785 writes their digits.
const EXACT: i64 = 1 << 53;
/// Decimal digits that surely fit into 10,000 bits.
const LONGEST_INTEGER: usize = 3_010;

/// The argument is not plain.
pub struct NotPlain;
/// What only plain arguments give.
pub type Plain<T> = Result<T, NotPlain>;

/// A `uuid.UUID`, not something that is derived from it.
pub fn is_uuid(value: &Bound<'_, PyAny>) -> bool {
    static UUID: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let uuid = UUID.import(value.py(), "uuid", "UUID");
    uuid.is_ok_and(|uuid| value.get_type().is(uuid))
}

/// An object as JSON; `known` turns false where a number in it is not in its canonical form.
pub fn json_object(value: &Bound<'_, PyAny>, known: &mut bool) -> Plain<String> {
    if !value.is_exact_instance_of::<PyDict>() {
        return Err(NotPlain);
    }
    let mut out = Vec::with_capacity(128);
    json(value, &mut out, 0, known)?;
    if out.len() > MAX_JSON {
        return Err(NotPlain);
    }
    String::from_utf8(out).map_err(|_| NotPlain)
}

/// Writes JSON in canonical order; `known` turns false where a number is written as Python has it instead.
fn json(value: &Bound<'_, PyAny>, out: &mut Vec<u8>, depth: usize, known: &mut bool) -> Plain<()> {
    if let Ok(text) = value.cast_exact::<PyString>() {
        json_text(text, out)?;
    } else if value.is_none() {
        out.extend_from_slice(b"null");
    } else if let Ok(truth) = value.cast_exact::<PyBool>() {
        out.extend_from_slice(if truth.is_true() { b"true" } else { b"false" });
    } else if let Ok(number) = value.cast_exact::<PyInt>() {
        json_integer(number, out, known)?;
    } else if let Ok(number) = value.cast_exact::<PyFloat>() {
        json_float(number.value(), out, known)?;
    } else if depth >= MAX_DEPTH || out.len() > MAX_JSON {
        return Err(NotPlain);
    } else if let Ok(members) = value.cast_exact::<PyDict>() {
        json_members(members, out, depth, known)?;
    } else if let Ok(items) = value.cast_exact::<PyList>() {
        json_items(items.iter(), out, depth, known)?;
    } else if let Ok(items) = value.cast_exact::<PyTuple>() {
        json_items(items.iter(), out, depth, known)?;
    } else {
        return Err(NotPlain);
    }
    Ok(())
}

fn json_text(text: &Bound<'_, PyString>, out: &mut Vec<u8>) -> Plain<()> {
    let text = text.to_str().map_err(|_| NotPlain)?;
    if text.as_bytes().contains(&0) {
        return Err(NotPlain);
    }
    canonical::write_string(out, text);
    Ok(())
}

fn json_integer(number: &Bound<'_, PyInt>, out: &mut Vec<u8>, known: &mut bool) -> Plain<()> {
    if let Ok(number) = number.extract::<i64>() {
        *known &= (-EXACT..=EXACT).contains(&number);
        canonical::write_integer(out, number);
        return Ok(());
    }
    *known = false;
    let digits = number.str().map_err(|_| NotPlain)?;
    let digits = digits.to_str().map_err(|_| NotPlain)?;
    if digits.len() > LONGEST_INTEGER {
        return Err(NotPlain);
    }
    out.extend_from_slice(digits.as_bytes());
    Ok(())
}

fn json_float(number: f64, out: &mut Vec<u8>, known: &mut bool) -> Plain<()> {
    if !number.is_finite() {
        return Err(NotPlain);
    }
    if number.fract() == 0.0 && number.abs() < EXACT as f64 {
        // 1.0 is stored as 1.0, so that it comes back as a float; the canonical form is 1.
        *known = false;
        out.extend_from_slice(format!("{number:.1}").as_bytes());
    } else {
        canonical::write_double(out, number);
    }
    Ok(())
}

fn json_members(
    members: &Bound<'_, PyDict>,
    out: &mut Vec<u8>,
    depth: usize,
    known: &mut bool,
) -> Plain<()> {
    let mut pairs = Vec::with_capacity(members.len());
    for (name, value) in members.iter() {
        pairs.push((
            name.cast_into_exact::<PyString>().map_err(|_| NotPlain)?,
            value,
        ));
    }
    let mut named = Vec::with_capacity(pairs.len());
    for (name, value) in &pairs {
        named.push((name.to_str().map_err(|_| NotPlain)?, name, value));
    }
    named.sort_unstable_by(|one, other| canonical::compare_names(one.0, other.0));
    out.push(b'{');
    for (place, (_, name, value)) in named.into_iter().enumerate() {
        if place > 0 {
            out.push(b',');
        }
        json_text(name, out)?;
        out.push(b':');
        json(value, out, depth + 1, known)?;
    }
    out.push(b'}');
    Ok(())
}

fn json_items<'py>(
    items: impl Iterator<Item = Bound<'py, PyAny>>,
    out: &mut Vec<u8>,
    depth: usize,
    known: &mut bool,
) -> Plain<()> {
    out.push(b'[');
    for (place, item) in items.enumerate() {
        if place > 0 {
            out.push(b',');
        }
        json(&item, out, depth + 1, known)?;
    }
    out.push(b']');
    Ok(())
}
