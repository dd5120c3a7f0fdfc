"""(Spec, Observed, History, now) → Plan. Pure."""
