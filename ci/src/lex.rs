//! Rust source with everything that is not code blanked out, for `tidy`.
//!
//! Invariant: the result has the same lines as the source, so that line numbers hold. It knows
//! comments, strings, raw strings and characters, and nothing of the grammar.

/// `source` with comments and the insides of literals replaced by spaces.
pub fn code_only(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let len = blank_len(bytes, at);
        if len == 0 {
            out.push(bytes[at]);
            at += 1;
        } else {
            let skipped = &bytes[at..at + len];
            out.extend(skipped.iter().map(|b| if *b == b'\n' { b'\n' } else { b' ' }));
            at += len;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// How many bytes at `at` are a comment or a literal; 0 for code.
fn blank_len(bytes: &[u8], at: usize) -> usize {
    let rest = &bytes[at..];
    let in_word = at > 0 && is_word(bytes[at - 1]);
    match rest {
        [b'/', b'/', ..] => rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => block_comment_len(rest),
        [b'"', ..] => string_len(rest),
        [b'r', b'"' | b'#', ..] if !in_word => raw_string_len(rest),
        [b'b' | b'c', b'r', b'"' | b'#', ..] if !in_word => match raw_string_len(&rest[1..]) {
            0 => 0,
            len => len + 1,
        },
        [b'\'', ..] => char_len(rest),
        _ => 0,
    }
}

/// Whether `b` may stand inside an identifier.
pub fn is_word(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b == b'_'
}

fn block_comment_len(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < rest.len() {
        match &rest[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

fn string_len(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

fn raw_string_len(rest: &[u8]) -> usize {
    let hashes = rest[1..].iter().take_while(|b| **b == b'#').count();
    if rest.get(1 + hashes) != Some(&b'"') {
        return 0; // r#type, an identifier
    }
    let end = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    let body = &rest[2 + hashes..];
    let found = body.windows(end.len()).position(|window| window == end);
    found.map_or(rest.len(), |at| 2 + hashes + at + end.len())
}

/// A character literal, or 0 when the quote opens a lifetime.
fn char_len(rest: &[u8]) -> usize {
    if rest.get(1) == Some(&b'\\') {
        let body = rest.get(3..).unwrap_or_default();
        return body.iter().position(|b| *b == b'\'').map_or(rest.len(), |at| at + 4);
    }
    // One character may take up to four bytes.
    (2..=5).find(|at| rest.get(*at) == Some(&b'\'')).map_or(0, |at| {
        let one = std::str::from_utf8(&rest[1..at]).is_ok_and(|s| s.chars().count() == 1);
        if one { at + 1 } else { 0 }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(source: &str, expected: &str) {
        let code = code_only(source);
        assert_eq!(code.split_whitespace().collect::<Vec<_>>().join(" "), expected, "{source}");
        assert_eq!(code.lines().count(), source.lines().count(), "{source}");
    }

    #[test]
    fn code_stays_and_all_else_goes() {
        check("a // unsafe\nb", "a b");
        check("a /* x /* unsafe */ \n y */ b", "a b");
        check(r#"let s = "un\"safe"; c"#, "let s = ; c");
        check("let s = r#\"unsafe \" x\"#; c", "let s = ; c");
        check("let s = br\"unsafe\\\"; c", "let s = ; c");
        check("fn f<'a>(x: &'a str) { 'x'; '\\''; '\"'; 'é'; b'\\\\' }", {
            "fn f<'a>(x: &'a str) { ; ; ; ; b }"
        });
        check("r#type for_r\"x\" b", "r#type for_r b");
    }
}
