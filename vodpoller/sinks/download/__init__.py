"""The images of snapshot events as files.

What an event says is not trusted: neither the hosts that it names, nor where those redirect to or what they resolve to,
nor the sizes that they announce, nor the ids from which file names are made.
"""
