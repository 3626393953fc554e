//! Vectors of RFC 8785, and properties.
use super::*;
use proptest::prelude::*;

fn canonical(text: &str) -> String {
    String::from_utf8(canonicalize(text).unwrap()).unwrap()
}

#[test]
fn the_example_of_rfc_8785_section_3_2_2() {
    let given = r#"{
      "numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
      "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
      "literals": [null, true, false]
    }"#;
    // 333333333.33333329 is not the shortest form of its double: by our rule it keeps its digits.
    let wanted = concat!(
        r#"{"literals":[null,true,false],"numbers":[333333333.33333329,1e+30,4.5,0.002,1e-27],"#,
        r#""string":"€$\u000f\nA'B\"\\\\\"/"}"#
    );
    assert_eq!(canonical(given), wanted);
    assert_eq!(canonical("333333333.3333333"), "333333333.3333333");
}

#[test]
fn the_order_of_names_of_rfc_8785_section_3_2_3() {
    let given = r#"{"\u20ac":"Euro Sign","\r":"Carriage Return","\ufb33":"Hebrew Letter Dalet With Dagesh",
        "1":"One","\ud83d\ude00":"Emoji: Grinning Face","\u0080":"Control","\u00f6":"Latin Small Letter O With Diaeresis"}"#;
    let order: Vec<String> = canonical(given)
        .split("\":\"")
        .skip(1)
        .map(|part| part.split('"').next().unwrap().to_owned())
        .collect();
    let wanted = [
        "Carriage Return",
        "One",
        "Control",
        "Latin Small Letter O With Diaeresis",
        "Euro Sign",
        "Emoji: Grinning Face",
        "Hebrew Letter Dalet With Dagesh",
    ];
    assert_eq!(order, wanted);
}

/// Appendix B of RFC 8785: the bits of a double and its text.
#[test]
fn the_numbers_of_rfc_8785_appendix_b() {
    let table: [(u64, &str); 26] = [
        (0x0000_0000_0000_0000, "0"),
        (0x8000_0000_0000_0000, "0"),
        (0x0000_0000_0000_0001, "5e-324"),
        (0x8000_0000_0000_0001, "-5e-324"),
        (0x7fef_ffff_ffff_ffff, "1.7976931348623157e+308"),
        (0xffef_ffff_ffff_ffff, "-1.7976931348623157e+308"),
        (0x4340_0000_0000_0000, "9007199254740992"),
        (0xc340_0000_0000_0000, "-9007199254740992"),
        (0x4430_0000_0000_0000, "295147905179352830000"),
        (0x44b5_2d02_c7e1_4af5, "9.999999999999997e+22"),
        (0x44b5_2d02_c7e1_4af6, "1e+23"),
        (0x44b5_2d02_c7e1_4af7, "1.0000000000000001e+23"),
        (0x444b_1ae4_d6e2_ef4e, "999999999999999700000"),
        (0x444b_1ae4_d6e2_ef4f, "999999999999999900000"),
        (0x444b_1ae4_d6e2_ef50, "1e+21"),
        (0x3eb0_c6f7_a0b5_ed8c, "9.999999999999997e-7"),
        (0x3eb0_c6f7_a0b5_ed8d, "0.000001"),
        (0x41b3_de43_5555_5553, "333333333.3333332"),
        (0x41b3_de43_5555_5554, "333333333.33333325"),
        (0x41b3_de43_5555_5555, "333333333.3333333"),
        (0x41b3_de43_5555_5556, "333333333.3333334"),
        (0x41b3_de43_5555_5557, "333333333.33333343"),
        (0xbecb_f647_612f_3696, "-0.0000033333333333333333"),
        (0x4314_3ff3_c1cb_0959, "1424953923781206.2"),
        (0x3ff0_0000_0000_0000, "1"),
        (0x3fb9_9999_9999_999a, "0.1"),
    ];
    for (bits, wanted) in table {
        let double = f64::from_bits(bits);
        let mut out = Vec::new();
        write_double(&mut out, double);
        assert_eq!(String::from_utf8(out).unwrap(), wanted, "{bits:#x}");
        assert_eq!(canonical(wanted), wanted);
    }
}

#[test]
fn what_no_double_holds_keeps_its_digits() {
    for (given, wanted) in [
        ("9007199254740993", "9007199254740993"),
        ("9223372036854775808", "9223372036854775808"),
        ("9007199254740994", "9007199254740994"),
        ("1e400", &format!("1{}", "0".repeat(400))),
        ("1e-400", &format!("0.{}1", "0".repeat(399))),
        ("0.1000000000000000000001", "0.1000000000000000000001"),
        (
            "123456789012345678901234567890",
            "123456789012345678901234567890",
        ),
        ("100000000000000000000000000000", "1e+29"),
        ("-0", "0"),
        ("-0.0", "0"),
        ("0e5", "0"),
        ("1.10", "1.1"),
        ("0.5e1", "5"),
    ] {
        assert_eq!(canonical(given), wanted, "{given}");
    }
    assert!(canonicalize("1e999999999999999999999").is_err());
}

#[test]
fn what_is_no_json_is_refused() {
    for given in [
        "",
        "{",
        "[1,]",
        "{\"a\":1,}",
        "01",
        "1.",
        ".5",
        "+1",
        "1e",
        "nul",
        "\"\\x\"",
        "\"\\ud800\"",
        "\"\\udc00\"",
        "\"\\ud800\\u0041\"",
        "\"\u{1}\"",
        "\"",
        "1 2",
        "{\"a\":1,\"a\":2}",
        "{a:1}",
        "\"\\u12g4\"",
    ] {
        assert!(canonicalize(given).is_err(), "{given:?}");
    }
    let deep = "[".repeat(MAX_DEPTH + 2) + &"]".repeat(MAX_DEPTH + 2);
    assert!(canonicalize(&deep).is_err());
}

fn json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        any::<f64>().prop_map(Into::into),
        "\\PC*".prop_map(Into::into),
    ];
    leaf.prop_recursive(4, 32, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Into::into),
            prop::collection::hash_map("\\PC{0,8}", inner, 0..6).prop_map(|members| members
                .into_iter()
                .collect::<serde_json::Map<_, _>>()
                .into()),
        ]
    })
}

/// The plain way: a tree, each object's members sorted by their names in UTF-16.
fn plainly(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::Array(items) => {
            let items: Vec<_> = items.iter().map(plainly).collect();
            format!("[{}]", items.join(","))
        }
        serde_json::Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(name, _)| name.encode_utf16().collect::<Vec<_>>());
            let members: Vec<_> = members
                .into_iter()
                .map(|(name, value)| format!("{}:{}", serde_json::json!(name), plainly(value)))
                .collect();
            format!("{{{}}}", members.join(","))
        }
        other => other.to_string(),
    }
}

/// What `serde_json` writes as RFC 8785 does: no doubles, and strings of every kind of character.
fn json_with_hard_names() -> impl Strategy<Value = serde_json::Value> {
    let character = prop_oneof![
        prop::char::range('\0', '~'),
        Just('"'),
        Just('\\'),
        prop::char::range('\u{d7f0}', '\u{e010}'),
        prop::char::range('\u{fff0}', '\u{1000f}'),
        any::<char>(),
    ];
    let text = prop::collection::vec(character, 0..24).prop_map(String::from_iter);
    // Few names, so that many begin alike.
    let name = prop_oneof![text.clone(), "[ab\u{e000}\u{10000}]{0,3}"];
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        text.prop_map(Into::into),
    ];
    leaf.prop_recursive(5, 64, 8, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Into::into),
            prop::collection::vec((name.clone(), inner), 0..8).prop_map(|members| members
                .into_iter()
                .collect::<serde_json::Map<_, _>>()
                .into()),
        ]
    })
}

/// JSON with space wherever it may be, every character escaped or none that need not be, and members as PostgreSQL orders
/// them: the shorter name first.
fn as_if_stored(value: &serde_json::Value, escaped: bool) -> String {
    let quoted = |text: &str| {
        if !escaped {
            return serde_json::json!(text).to_string();
        }
        let units = text.encode_utf16().map(|unit| format!("\\u{unit:04X}"));
        format!("\"{}\"", units.collect::<String>())
    };
    match value {
        serde_json::Value::String(text) => quoted(text),
        serde_json::Value::Array(items) => {
            let items: Vec<_> = items
                .iter()
                .map(|item| as_if_stored(item, escaped))
                .collect();
            format!("[ {} ]", items.join(" ,\n"))
        }
        serde_json::Value::Object(members) => {
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(name, _)| (name.len(), (*name).clone()));
            let members: Vec<_> = members
                .into_iter()
                .map(|(name, value)| {
                    format!("{}\t: {}", quoted(name), as_if_stored(value, escaped))
                })
                .collect();
            format!("{{ {} }}\r", members.join(" , "))
        }
        other => other.to_string(),
    }
}

#[test]
fn what_surrounds_a_value_does_not_move_with_its_members() {
    for (given, wanted) in [
        (
            r#"[1,{"b":{"d":1,"c":[{"f":0,"e":0}]},"a":2},3]"#,
            r#"[1,{"a":2,"b":{"c":[{"e":0,"f":0}],"d":1}},3]"#,
        ),
        (
            r#"{"a":{"z":1,"y":2},"b":{}}"#,
            r#"{"a":{"y":2,"z":1},"b":{}}"#,
        ),
        (r#"{"\u0062":1,"a":2}"#, r#"{"a":2,"b":1}"#),
        (r#"{"a":[],"":{}}"#, r#"{"":{},"a":[]}"#),
    ] {
        assert_eq!(canonical(given), wanted);
        let mut out = b"before".to_vec();
        canonicalize_into(&mut out, given).unwrap();
        assert_eq!(out, format!("before{wanted}").as_bytes());
    }
    for twice in [
        r#"{"a":1,"\u0061":1}"#,
        r#"{"b":1,"a":{"c":1,"b":1,"c":1}}"#,
        r#"[{"x":{"a":1},"y":1,"x":2}]"#,
    ] {
        let error = canonicalize(twice).unwrap_err().to_string();
        assert!(error.contains("two members of the name"), "{error}");
    }
}

#[test]
fn what_needs_escapes_is_found_at_every_place() {
    for length in 0..40 {
        for byte in 0..0x80_u8 {
            let text = "é".repeat(length / 2)
                + &"~".repeat(length % 2)
                + &char::from(byte).to_string()
                + "rest\"";
            let mut out = Vec::new();
            write_string(&mut out, &text);
            assert_eq!(
                String::from_utf8(out).unwrap(),
                serde_json::json!(text).to_string()
            );
        }
    }
}

proptest! {
    #[test]
    fn what_is_read_once_is_what_a_sorted_tree_says(value in json_with_hard_names(), escaped: bool) {
        prop_assert_eq!(canonical(&as_if_stored(&value, escaped)), plainly(&value));
    }

    #[test]
    fn names_have_the_order_of_utf16(one in "\\PC{0,4}|[a\u{d7ff}\u{e000}\u{ffff}\u{10000}]{0,4}", other in "[a\u{d7ff}\u{e000}\u{ffff}\u{10000}]{0,4}") {
        let plainly = one.encode_utf16().cmp(other.encode_utf16());
        prop_assert_eq!(compare_names(&one, &other), plainly);
    }

    #[test]
    fn canonical_bytes_are_the_same_again_and_mean_the_same(value in json()) {
        let text = value.to_string();
        let once = canonical(&text);
        prop_assert_eq!(&canonical(&once), &once);
        prop_assert_eq!(&canonical(&serde_json::to_string_pretty(&value).unwrap()), &once);
    }

    #[test]
    fn every_double_reads_back(bits in any::<u64>()) {
        let double = f64::from_bits(bits);
        prop_assume!(double.is_finite());
        let mut out = Vec::new();
        write_double(&mut out, double);
        let text = String::from_utf8(out).unwrap();
        prop_assert_eq!(text.parse::<f64>().unwrap().to_bits(), if double == 0.0 { 0 } else { bits });
        prop_assert_eq!(canonical(&text), text.clone());
        // jsonb writes numbers without exponents.
        prop_assert_eq!(canonical(&format!("{double}")), text);
    }

    #[test]
    fn integers_of_any_size_keep_their_value(digits in "[1-9][0-9]{0,60}", zeros in 0_usize..30) {
        let given = digits + &"0".repeat(zeros);
        let told = canonical(&given);
        if told.contains('e') {
            let double: f64 = given.parse().unwrap();
            prop_assert_eq!(told.parse::<f64>().unwrap().to_bits(), double.to_bits());
            prop_assert!(told.len() < 25, "only the shortest form of a double is written so");
        } else {
            prop_assert_eq!(told, given);
        }
    }

    #[test]
    fn no_text_makes_it_panic(text in "\\PC*") {
        let _ = canonicalize(&text);
    }
}
