"""Models whose variables get their values later, or never.

Keras has no public door to this: variables that are made in
a `keras.StatelessScope` wait for their values in a list.
"""

import keras
from keras.src.backend.common import global_state


class Deferred(keras.StatelessScope):
    """A scope in which models are made without memory for their weights.

    Example:

    ```python
    with Deferred() as deferred:
        model = zoo.switch_transformer("c-2048")
    model.count_params()  # a model with shapes and no values
    deferred.initialize()  # now it has some
    ```
    """

    def __init__(self):
        super().__init__(initialize_variables=False)
        self.variables = []

    def __enter__(self):
        self._waiting = global_state.get_global_attribute(
            "uninitialized_variables", [], set_to_default=True
        )
        self._before = len(self._waiting)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.variables = self._waiting[self._before :]
        del self._waiting[self._before :]

    def initialize(self, values=()):
        """Gives every variable that was made in the scope its value.

        Args:
            values: pairs of a variable and a function that returns its value, an array or tensor,
                which is called when its turn has come; other variables get what their own
                initializers say.
        """
        given = set()
        for variable, function in values:
            variable._initializer = lambda shape, dtype=None, function=function: function()
            variable._deferred_initialize()
            given.add(id(variable))
            del function  # what it may hold is not needed while the next one is made
        for variable in self.variables:
            if id(variable) not in given:
                variable._deferred_initialize()
        self.variables = []
