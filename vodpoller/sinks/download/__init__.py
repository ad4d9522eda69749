"""The sink `download`: the images of snapshot events as files.

The content of an event is not trusted: neither the hosts that it names, nor the addresses of these hosts and the
redirects and sizes that they send, nor the ids from which file names are made.
"""
