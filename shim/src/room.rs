//! Room in the machine: what the pod's containers may use, and that the machine has it.

use serde_json::Value;

use crate::errors::{Error, Result};
use crate::machine::Machine;
use crate::pod::{Pod, lock};
use crate::size::Limits;

impl Pod {
    /// What all containers may use that are there or about to be.
    fn all_limits(&self) -> Vec<Limits> {
        lock(&self.limits).values().copied().collect()
    }

    /// Counts a container in, and sees that the machine has what it may use.
    ///
    /// # Errors
    /// What could not be had.
    pub async fn make_room(&self, machine: &Machine, id: &str, limits: Limits) -> Result<()> {
        lock(&self.limits).insert(id.to_owned(), limits);
        self.fill_room(machine).await
    }

    /// Sees that the machine has what all may use.
    async fn fill_room(&self, machine: &Machine) -> Result<()> {
        Ok(machine.resize(|bounds, now| now.or_more(bounds.needed(&self.all_limits()))).await?)
    }

    /// Counts a container out that uses nothing any more; what it had goes with [`Pod::take_room_back`].
    pub fn leave_room(&self, id: &str) {
        lock(&self.limits).remove(id);
    }

    /// Takes from the machine what no container may use.
    pub async fn take_room_back(&self, machine: &Machine) {
        if let Err(error) = machine.resize(|bounds, _| bounds.needed(&self.all_limits())).await {
            log::warn!("pod {}: {error:#}", self.id());
        }
    }

    /// New limits for a container, and room for them in the machine.
    ///
    /// # Errors
    /// What could not be had, or set; then the limits are as before.
    pub async fn update(&self, id: &str, resources: Vec<u8>) -> Result<()> {
        self.container(id)?;
        let machine = self.machine()?;
        let named: Value =
            serde_json::from_slice(&resources).map_err(|error| Error::Invalid(format!("container {id}: its resources: {error}")))?;
        // A sandbox, or a container that has ended, counts for nothing.
        let before = lock(&self.limits).get(id).copied();
        let set = |limits: Option<Limits>| {
            if let (Some(limits), Some(now)) = (limits, lock(&self.limits).get_mut(id)) {
                *now = limits;
            }
        };
        set(before.map(|limits| limits.updated(&named)));
        let updated = async {
            self.fill_room(&machine).await?;
            machine.sandbox.agent.update(id, resources).await
        };
        let updated = updated.await.inspect_err(|_| set(before));
        self.take_room_back(&machine).await;
        updated
    }
}
