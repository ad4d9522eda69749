"""The listener: metrics, probes and the status page over HTTP. Imported only if the configuration has one."""
