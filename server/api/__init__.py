"""The HTTP face: OpenAI-compatible endpoints over any ``AsyncEngine``.

``app.create_app`` is the way in. A request passes ``middleware`` and ``auth``, is parsed by ``body`` into a
wire model of ``*schemas``, becomes a ``translate.Job`` and is answered by ``generate``. No tensors here.
"""
