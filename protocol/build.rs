//! Generates the agent's messages and service, and the messages of the CRI that the shim reads
//! (pure Rust, no protoc).

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=agent.proto");
    println!("cargo:rerun-if-changed=cri.proto");
    let source = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    ttrpc_codegen::Codegen::new()
        .inputs([source.join("agent.proto"), source.join("cri.proto")])
        .include(&source)
        .rust_protobuf()
        .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(false))
        .customize(ttrpc_codegen::Customize { async_all: true, ..Default::default() })
        .out_dir(&out)
        .run()
        .expect("the .proto files are valid");
    // `include!` refuses inner attributes and inner doc comments.
    for name in ["agent.rs", "agent_ttrpc.rs", "cri.rs"] {
        let path = out.join(name);
        let text = std::fs::read_to_string(&path).expect("codegen wrote the file");
        let kept: Vec<&str> = text.lines().filter(|line| !line.starts_with("#!") && !line.starts_with("//!")).collect();
        std::fs::write(&path, kept.join("\n")).expect("OUT_DIR is writable");
    }
}
