//! Settings of which there are a few kinds.

/// What becomes of a container that asks for namespaces of the host, which a machine cannot share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostNamespaces {
    /// It is refused.
    Refuse,
    /// It gets the pod's.
    Pod,
}

impl HostNamespaces {
    /// As the configuration has them.
    pub const NAMES: &[(&str, Self)] = &[("refuse", Self::Refuse), ("pod", Self::Pod)];
}

/// What network a pod has that was given none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetworkDefault {
    /// Its loopback interface alone.
    None,
    /// One that a program of the host carries over sockets of its own.
    User,
}

impl NetworkDefault {
    /// As the configuration has them.
    pub const NAMES: &[(&str, Self)] = &[("none", Self::None), ("user", Self::User)];
}

/// Which containers have the layers of their image as disks, where a snapshotter has made file systems of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskLayers {
    /// None.
    Never,
    /// Those whose root file system is read-only.
    ReadOnly,
    /// All that can.
    Always,
}

impl DiskLayers {
    /// As the configuration has them.
    pub const NAMES: &[(&str, Self)] = &[("never", Self::Never), ("read-only", Self::ReadOnly), ("always", Self::Always)];
}

/// How an interface of a pod's network namespace is joined to its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Join {
    /// Traffic control redirects frames between it and a tap.
    Redirect,
    /// A macvtap on it takes what arrives.
    Macvtap,
}

impl Join {
    /// As the configuration has them.
    pub const NAMES: &[(&str, Self)] = &[("redirect", Self::Redirect), ("macvtap", Self::Macvtap)];
}

/// What becomes of a socket or FIFO of the host among a container's mounts, whose other end a machine cannot reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostSockets {
    /// The container is refused.
    Refuse,
    /// It is bound, and nobody answers.
    Dead,
    /// Connections to a socket are carried to the host's; a FIFO is refused.
    Carry,
}

impl HostSockets {
    /// As the configuration has them.
    pub const NAMES: &[(&str, Self)] = &[("refuse", Self::Refuse), ("dead", Self::Dead), ("carry", Self::Carry)];
}

/// Which guests may run at once on the hardware threads of one core of the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CoreScheduling {
    /// [`Self::Tenant`] for a pod of a tenant, [`Self::Pod`] where containerd asks for it, else [`Self::Off`].
    Auto,
    /// Those of one pod.
    Pod,
    /// Those of one tenant's pods; a pod without a tenant is alone.
    Tenant,
    /// All.
    Off,
}

impl CoreScheduling {
    /// As the configuration has them.
    pub const NAMES: &[(&str, Self)] = &[("auto", Self::Auto), ("pod", Self::Pod), ("tenant", Self::Tenant), ("off", Self::Off)];
}
