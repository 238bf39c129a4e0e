//! Rate limits: token buckets, of bytes and of operations.

use std::time::{Duration, Instant};

use caisson_protocol::vmm::RateLimit;

/// For so long what was not used may be used later, all at once.
const BURST: Duration = Duration::from_millis(100);
const SECOND_NS: u128 = 1_000_000_000;

/// What may pass a device, in one direction or in both.
///
/// Whatever comes may pass as long as nothing is owed, and is paid for afterwards: what is larger
/// than a bucket holds passes as well, and what follows waits the longer.
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Limiter {
    /// A limiter with full buckets.
    pub fn new(limit: RateLimit, now: Instant) -> Self {
        Self { bytes: Bucket::new(limit.bytes, now), operations: Bucket::new(limit.operations, now) }
    }

    /// How long what comes next has to wait.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.buckets().filter_map(|bucket| bucket.wait(now)).max()
    }

    /// Pays for one operation.
    pub fn pay(&mut self, bytes: usize) {
        if let Some(bucket) = &mut self.bytes {
            bucket.pay(bytes as u64);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.pay(1);
        }
    }

    fn buckets(&mut self) -> impl Iterator<Item = &mut Bucket> {
        self.bytes.iter_mut().chain(&mut self.operations)
    }
}

/// One direction of a device that is served by events: what may pass, and when the rest may.
pub struct Way {
    limiter: Limiter,
    held: Option<Instant>,
}

impl Way {
    /// A way that nothing waits on.
    pub fn new(limit: RateLimit) -> Self {
        Self { limiter: Limiter::new(limit, Instant::now()), held: None }
    }

    /// Whether what comes next may pass.
    pub fn is_open(&mut self, now: Instant) -> bool {
        self.held = self.limiter.wait(now).map(|wait| now + wait);
        self.held.is_none()
    }

    /// When what was held back last may pass; `None` when it was not.
    pub fn held(&self) -> Option<Instant> {
        self.held
    }

    /// Pays for what has passed.
    pub fn pay(&mut self, bytes: usize) {
        self.limiter.pay(bytes);
    }
}

/// A token bucket that may be in debt.
struct Bucket {
    /// Tokens in a second.
    rate: u64,
    /// Tokens times nanoseconds in a second, so that no time is too short to count.
    level: i128,
    filled: Instant,
}

impl Bucket {
    /// A full one; `None` for a rate of 0, which is no limit.
    fn new(rate: u64, now: Instant) -> Option<Self> {
        (rate > 0).then(|| Self { rate, level: Self::full(rate), filled: now })
    }

    fn full(rate: u64) -> i128 {
        i128::from(rate) * BURST.as_nanos().cast_signed()
    }

    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let elapsed = now.saturating_duration_since(self.filled).as_nanos().cast_signed();
        self.filled = now;
        self.level = self.level.saturating_add(elapsed.saturating_mul(self.rate.into())).min(Self::full(self.rate));
        let owed = u128::try_from(-self.level).ok().filter(|owed| *owed > 0)?;
        Some(Duration::from_nanos(u64::try_from(owed.div_ceil(self.rate.into())).unwrap_or(u64::MAX)))
    }

    fn pay(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub((u128::from(tokens) * SECOND_NS).cast_signed());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limit(bytes: u64, operations: u64) -> RateLimit {
        RateLimit { bytes, operations }
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let now = Instant::now();
        let mut limiter = Limiter::new(limit(0, 0), now);
        for _ in 0..1000 {
            limiter.pay(1 << 30);
        }
        assert_eq!(limiter.wait(now), None);
    }

    #[test]
    fn what_was_not_used_for_a_tenth_of_a_second_may_come_at_once_and_no_more() {
        let mut now = Instant::now();
        let mut limiter = Limiter::new(limit(0, 100), now);
        now += Duration::from_secs(3600);
        assert_eq!((0..20).take_while(|_| limiter.wait(now).is_none().then(|| limiter.pay(0)).is_some()).count(), 11);
        assert_eq!(limiter.wait(now), Some(Duration::from_millis(10)));
        assert_eq!(limiter.wait(now + Duration::from_millis(10)), None);
    }

    #[test]
    fn the_stricter_of_both_limits_holds() {
        let now = Instant::now();
        let mut limiter = Limiter::new(limit(1000, 1000), now);
        limiter.pay(1100);
        assert_eq!(limiter.wait(now), Some(Duration::from_secs(1)));
    }

    proptest! {
        #[test]
        fn in_the_long_run_the_rate_is_kept(rate in 1u64..1 << 40, sizes in proptest::collection::vec(0usize..1 << 20, 1..200)) {
            let start = Instant::now();
            let mut now = start;
            let mut limiter = Limiter::new(limit(rate, 0), now);
            let mut passed = 0u128;
            for size in &sizes {
                while let Some(wait) = limiter.wait(now) {
                    prop_assert!(wait > Duration::ZERO);
                    now += wait;
                }
                passed += *size as u128;
                limiter.pay(*size);
            }
            let allowed = u128::from(rate) * ((now - start).as_nanos() + BURST.as_nanos()) / SECOND_NS + (1 << 20) + 1;
            prop_assert!(passed <= allowed, "{passed} bytes passed and {allowed} were allowed");
        }
    }
}
