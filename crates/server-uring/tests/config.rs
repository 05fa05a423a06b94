//! `ringfsd check-config`, as it is called.

use std::path::Path;
use std::process::{Command, Output};

fn check_config(file: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringfsd"));
    command.arg("check-config").arg(file).output().expect("ringfsd runs")
}

#[test]
fn it_prints_what_is_in_force_or_what_is_wrong() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("ringfsd.toml");
    let share = dir.path().display();
    let good = format!(
        "grace = 5\n[[listen]]\naddress = \"vsock:5640\"\n\
         [share.src]\npath = \"{share}\"\nro = true\n"
    );
    std::fs::write(&file, &good).expect("write");
    let output = check_config(&file);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let printed = String::from_utf8(output.stdout).expect("text");
    for line in ["grace = 5", "engine = \"uring\"", "[share.src]", "ro = true", "dev = false"] {
        assert!(printed.lines().any(|found| found == line), "{line} in {printed}");
    }
    // What is printed is a file that says the same.
    std::fs::write(&file, &printed).expect("write");
    assert_eq!(check_config(&file).stdout, printed.as_bytes());

    let check = |text: &str, line: usize, what: &str| {
        std::fs::write(&file, text).expect("write");
        let output = check_config(&file);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let said = String::from_utf8(output.stderr).expect("text");
        let place = format!("ringfsd: {}:{line}: ", file.display());
        assert!(said.contains(&place) && said.contains(what), "{place} {what} in {said}");
    };
    check(&good.replace("ro =", "readonly ="), 6, "unknown field `readonly`; known here: ");
    check(&good.replace("grace", "grave"), 1, "did you mean `grace`?");
    check(&good.replace(&share.to_string(), "/nowhere"), 4, "No such file or directory");
    std::fs::remove_file(&file).expect("remove");
    let output = check_config(&file);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot be read: No such file"));
}
