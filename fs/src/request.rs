//! Requests that we answer ourselves: virtiofsd's server reads no arguments of them (linux/fuse.h).

use std::io::{self, Read, Write};

use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::{Context, Entry, OpenOptions};
use virtiofsd::fuse::{CreateIn, EntryOut, InHeader, OpenOut, OutHeader};
use vm_memory::ByteValued;

use crate::share::{Handle, Inode};

/// Makes a file without a name in a folder, and opens it.
pub type Make = Box<dyn Fn(Context, Inode, &CreateIn) -> io::Result<(Entry, Handle, OpenOptions)> + Send + Sync>;

/// Reads a part of a request.
///
/// # Errors
/// When it is shorter than that.
pub fn read<T: ByteValued + Default>(request: &mut Reader<'_>) -> io::Result<T> {
    let mut value = T::default();
    request.read_exact(value.as_mut_slice())?;
    Ok(value)
}

/// Answers a request; returns the length of the answer.
///
/// # Errors
/// When it has no room.
pub fn answer(room: &mut Writer<'_>, unique: u64, outcome: io::Result<impl AsRef<[u8]>>) -> io::Result<usize> {
    let error = outcome.as_ref().map_or_else(|error| -error.raw_os_error().unwrap_or(libc::EIO), |_| 0);
    let body = outcome.as_ref().map_or(&[][..], AsRef::as_ref);
    let length = size_of::<OutHeader>() + body.len();
    // An answer fits into a chain, whose length is a number of 32 bits.
    room.write_all(OutHeader { len: length as u32, error, unique }.as_slice())?;
    room.write_all(body)?;
    Ok(length)
}

/// Answers `FUSE_TMPFILE`: as `FUSE_CREATE`, but that its name is none.
///
/// # Errors
/// When the request has no header, or its answer no room.
pub fn tmpfile(make: &Make, mut request: Reader<'_>, mut room: Writer<'_>) -> io::Result<usize> {
    let header: InHeader = read(&mut request)?;
    let made = read(&mut request).and_then(|wanted| make(Context::from(header), header.nodeid, &wanted));
    let body = made.map(|(entry, fh, options)| {
        let open = OpenOut { fh, open_flags: options.bits(), ..Default::default() };
        [EntryOut::from(entry).as_slice(), open.as_slice()].concat()
    });
    answer(&mut room, header.unique, body)
}
