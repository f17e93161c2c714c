"""Studies: claims of the papers that are shown on small models by enumeration, without a run of `align train`.

A study is a module with a function of its own name, `(seed: int, *, ...) -> Mapping[str, float]`: the figures of one
seed by name. Its keyword-only parameters are the options that a recipe gives. `FIGURES` beside it lists the names, or
patterns such as `kl/*`, so that a recipe which expects another figure is refused when it is composed.
"""
