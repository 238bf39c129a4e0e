//! Generates the agent's messages and service, and the messages of containerd and the CRI that the
//! shim reads (pure Rust, no protoc).

use std::path::{Path, PathBuf};

/// What host and guest have to have in common.
const COMMON: [&str; 2] = ["agent.proto", "src/guest.rs"];

fn main() {
    println!("cargo:rerun-if-changed=agent.proto");
    println!("cargo:rerun-if-changed=cri.proto");
    println!("cargo:rerun-if-changed=options.proto");
    let source = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    println!("cargo:rustc-env=PROTOCOL_DIGEST={:08x}", digest(&source));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    ttrpc_codegen::Codegen::new()
        .inputs([source.join("agent.proto"), source.join("cri.proto"), source.join("options.proto")])
        .include(&source)
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .out_dir(&out)
        .run()
        .expect("the .proto files are valid");
    // `include!` refuses inner attributes and inner doc comments.
    for name in ["agent.rs", "agent_ttrpc.rs", "cri.rs", "options.rs"] {
        let path = out.join(name);
        let text = std::fs::read_to_string(&path).expect("codegen wrote the file");
        let kept: Vec<&str> = text.lines().filter(|line| !line.starts_with("#!") && !line.starts_with("//!")).collect();
        std::fs::write(&path, kept.join("\n")).expect("OUT_DIR is writable");
    }
}

/// FNV-1a over the files that host and guest have in common.
fn digest(source: &Path) -> u32 {
    let mut digest = 0x811c_9dc5_u32;
    for name in COMMON {
        println!("cargo:rerun-if-changed={name}");
        for byte in std::fs::read(source.join(name)).expect("the file is a part of this crate") {
            digest = (digest ^ u32::from(byte)).wrapping_mul(0x0100_0193);
        }
    }
    digest
}
