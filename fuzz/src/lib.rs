//! What the fuzz targets share: a target's input as a sequence of numbers and bytes, and a driver's
//! side of virtqueues whose rings lie where the target can reach them.

pub mod driver;

/// The bytes that a target is given, taken from the front.
pub struct Input<'i>(pub &'i [u8]);

impl<'i> Input<'i> {
    /// Whether there is nothing left: then all numbers are 0.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// So many bytes, or as many as there are.
    pub fn bytes(&mut self, count: usize) -> &'i [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A number of one byte.
    pub fn u8(&mut self) -> u8 {
        self.number(1) as u8
    }

    /// A number of two bytes.
    pub fn u16(&mut self) -> u16 {
        self.number(2) as u16
    }

    /// A number of four bytes.
    pub fn u32(&mut self) -> u32 {
        self.number(4) as u32
    }

    /// A number of eight bytes.
    pub fn u64(&mut self) -> u64 {
        self.number(8)
    }

    fn number(&mut self, bytes: usize) -> u64 {
        self.bytes(bytes).iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }
}
