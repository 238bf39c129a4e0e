//! Calls of containerd that are run to their end, also when its time is up: the server drops what it
//! waits for then, and a container that is half made or half deleted is worse than one that is late.

use tokio::sync::oneshot;

use crate::errors::{Error, Result};

/// Runs a call to its end.
///
/// # Errors
/// Those of the call.
pub async fn whole<T: Send + 'static>(call: impl Future<Output = Result<T>> + Send + 'static) -> ttrpc::Result<T> {
    whole_or(call, async {}).await
}

/// Runs a call to its end, and takes back what it made when nobody waits for that any more.
///
/// # Errors
/// Those of the call.
pub async fn whole_or<T: Send + 'static>(
    call: impl Future<Output = Result<T>> + Send + 'static,
    take_back: impl Future<Output = ()> + Send + 'static,
) -> ttrpc::Result<T> {
    let (answer, answered) = oneshot::channel();
    tokio::spawn(async move {
        if let Err(Ok(_)) = answer.send(call.await) {
            take_back.await;
        }
    });
    let outcome = answered.await;
    Ok(outcome.unwrap_or_else(|error| Err(Error::Failed(anyhow::Error::new(error).context("serve a call"))))?)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_call_that_nobody_waits_for_is_run_to_its_end_and_taken_back() {
        let (ended, mut end) = tokio::sync::mpsc::unbounded_channel();
        let taken_back = ended.clone();
        let (go, go_on) = oneshot::channel();
        let call = async move {
            go_on.await.unwrap();
            ended.send("made").unwrap();
            Ok(())
        };
        let take_back = async move { taken_back.send("taken back").unwrap() };
        assert!(tokio::time::timeout(Duration::from_millis(1), whole_or(call, take_back)).await.is_err());
        go.send(()).unwrap();
        assert_eq!((end.recv().await, end.recv().await, end.recv().await), (Some("made"), Some("taken back"), None));
    }

    #[tokio::test]
    async fn what_somebody_waits_for_stays() {
        let (taken_back, mut end) = tokio::sync::mpsc::unbounded_channel::<()>();
        let take_back = async move { taken_back.send(()).unwrap() };
        assert_eq!(whole_or(async { Ok(7) }, take_back).await.unwrap(), 7);
        assert_eq!(end.recv().await, None);
        assert!(whole(async { Err::<(), _>(Error::Gone("gone".into())) }).await.is_err());
    }
}
