"""Capacity on paper: how fast a model decodes on given hardware, how many sequences fit, whether speculation pays.

``footprint`` counts a model's bytes and operations, ``devices`` knows data sheets, ``measured`` asks this machine;
``roofline`` makes seconds of them, ``speculation`` weighs drafts, ``traffic`` answers for requests per second, ``plan``
puts it together and ``report`` shows it. All but ``measured`` and ``check`` is arithmetic: no weights, no device.
"""
