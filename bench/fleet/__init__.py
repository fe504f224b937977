"""A fleet of caller processes: services and jobs that use the official SDK as any application does."""
